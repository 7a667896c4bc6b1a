"""Hosts that microscale plugs into."""
