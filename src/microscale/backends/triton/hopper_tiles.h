// Whose a unit of `hopper_wide.cu` is: by lists in shared memory, which each program makes for itself, or by those of a
// kernel ahead. `hopper_unit.h` and, if programs have lists, `hopper_lists.h` come before it.

#if LISTED
__shared__ Lists lists_;

DEVICE void find(const Given &a) {
  find_tiles(a, lists_);
  __syncthreads();
}
DEVICE Tile experts_unit(const Given &a, int u) { return listed_unit(a, lists_, u); }
DEVICE int route_at(const Given &, int place) { return lists_.order[place]; }
#else
DEVICE void find(const Given &) {}
DEVICE Tile experts_unit(const Given &a, int u) {
  const int used = load(tiles_used(a.progress));
  Tile t = unit_of(a, used, u);
  if (t.tile >= used) return t;
  t.expert = load(reinterpret_cast<const int *>(a.tile_experts) + t.tile);
  const int *ends = reinterpret_cast<const int *>(a.ends);
  const int first = t.expert ? load(ends + t.expert - 1) : 0, all = load(ends + t.expert) - first;
  const int each = tokens_of_each(all, (all + MOST - 1) / MOST);
  const int part = (load(reinterpret_cast<const int *>(a.tile_starts) + t.tile) - first) / MOST;
  t.start = first + part * each;
  t.count = min(each, all - part * each);
  return t;
}
DEVICE int route_at(const Given &a, int place) { return load(reinterpret_cast<const int *>(a.order) + place); }
#endif

// A token's place in the result of the second product, and its share there.
struct Route {
  int to;
  float share;
};

DEVICE Route route_of(const Given &a, const Tile &t, int token) {
  Route r = {0, 0.0f};
  if (t.product == 0) return r;
  r.to = route_at(a, t.start + min(token, t.count - 1));
  r.share = share_of(a, r.to);
  return r;
}

// A group is done with a unit of w13.
DEVICE void tell(const Given &a, const Tile &t, int side) {
  meet(side);
  if (threadIdx.x % 128 == 0) add_one(tile_done(a.progress, t.tile));
}
