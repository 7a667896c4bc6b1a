"""Times of kernels beside what the machine could do: shapes, weights, ceilings, timings, and the roofline of all."""
