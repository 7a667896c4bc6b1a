// Hopper's instructions for `hopper_wide.cu`, `hopper_linear.cu` and `hopper_rings.cu`. The tests have them for a CPU.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ u8 name[]

DEVICE u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// A barrier in shared memory: whoever waits for a parity waits for the end of the phase that has it.
DEVICE void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
DEVICE void barriers_are_there() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEVICE void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// Whether a wait would end at once, perhaps: no is not certain.
DEVICE bool barrier_passed(u32 bar, u32 parity) {
  u32 yes;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(yes)
      : "r"(bar), "r"(parity)
      : "memory");
  return yes;
}
// Of a group of warps.
DEVICE void meet(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
// Of so many threads, by a barrier of their own, 1 to 15.
DEVICE void meet_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// 16 bytes to shared memory, of which the first `bytes` are copied and the others become 0.
DEVICE void copy16(u32 to, u64 from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// 4 bytes.
DEVICE void copy4(u32 to, u64 from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// Arrives once this thread's copies have.
DEVICE void barrier_arrive_copied(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// Of a warp whose threads are all here, one: what it says to the copying engine needs no loop over threads.
DEVICE bool elected() {
  u32 me;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(me));
  return me;
}
// Arrives, and the phase does not end before so many bytes have come.
DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Of a matrix in the memory of bfloat16, so many rows as `map` says of 64 columns each, swizzled; zeros past its ends.
DEVICE void copy_box(u32 to, const void *map, int column, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(bar)
      : "memory");
}
// Of a matrix of bytes 64 rows, from so many times 32 on, of 128 bytes each, swizzled. Of 32 rows, row 8 t + 2 j + i
// comes as row 8 j + 2 t + i, so that a lane's columns of a product follow one another. `column`: in twos of bytes.
DEVICE void copy_rows(u32 to, const void *map, int column, int row32, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %3, "
      "%4}], [%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(0), "r"(row32), "r"(bar)
      : "memory");
}
// The map will be needed soon.
DEVICE void fetch_map(const void *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// A multiple of 16 bytes.
DEVICE void copy_bytes(u32 to, u64 from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar)
               : "memory");
}
// What will be read soon may come nearer: it may still be written, too.
DEVICE void fetch_bytes(u64 from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void products_see_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What others have written to memory is there for bytes that the copying engine brings.
DEVICE void copies_see_stores() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

DEVICE uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
DEVICE uint2 shared8(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
DEVICE u32 shared4(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
// Of what the kernel ahead may write: unlike a load of what is constant, the compiler leaves it behind `wait_ahead`.
DEVICE int load(const int *p) {
  int v;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// How far experts are: [0] units that are claimed, [1] tiles of tokens that there are, and of each tile behind these
// how many groups are done with w13.
DEVICE const int *tiles_used(u64 progress) { return reinterpret_cast<const int *>(progress) + 1; }
DEVICE u64 tile_done(u64 progress, int tile) { return progress + 4 * (2 + static_cast<u64>(tile)); }
DEVICE int claim(u64 progress) {
  int v;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(v) : "l"(progress) : "memory");
  return v;
}
// What this thread has written, and those it has met, is there for whoever sees the number.
DEVICE void add_one(u64 to) {
  asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(to) : "memory");
}
DEVICE void wait_until(u64 at, int least) {
  for (;;) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    if (v >= least) return;
    asm volatile("nanosleep.u32 100;");
  }
}
// Predicated: a branch around each is what others would wait behind.
DEVICE void store4_if(bool yes, u64 to, u32 v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p st.global.b32 [%0], %1;\n}" ::"l"(to), "r"(v),
               "r"(static_cast<int>(yes))
               : "memory");
}
DEVICE void store8_if(bool yes, u64 to, uint2 v) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p st.global.v2.b32 [%0], {%1, %2};\n}" ::"l"(to), "r"(v.x),
               "r"(v.y), "r"(static_cast<int>(yes))
               : "memory");
}
// Products are a group from their beginning to their end; waiting leaves so many groups under way.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// A sum that is read after what stands above.
DEVICE void not_before(float &v) { asm volatile("" : "+f"(v)::"memory"); }

// An address that the compiler takes apart no more: what it would keep of its parts takes more registers than there
// are.
DEVICE void unknown(u64 &v) { asm volatile("" : "+l"(v)); }
DEVICE void unknown(u32 &v) { asm volatile("" : "+r"(v)); }
// A use, for what is never reached.
DEVICE void needs(u32 v) { asm volatile("st.shared.u32 [%0], %0;" ::"r"(v) : "memory"); }

// Four matrices of 8 by 8 numbers of 16 bits, side by side: a lane says where a row of one begins, lane 8 i + r row r
// of matrix i.
DEVICE void load_matrices(u32 (&v)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at)
               : "memory");
}
// d += w @ x of a warp: 16 rows, 8 tokens and 16 columns.
DEVICE void multiply_16(float *d, const u32 *w, u32 x0, u32 x1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
}

template <int COUNT>
DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// What the kernel ahead wrote is there; and the one behind may be launched, which waits for this one.
DEVICE void wait_ahead() { asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory"); }

// A NaN stays one.
DEVICE float at_most(float v, float limit) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(limit));
  return r;
}
// 1 / (1 + e^-v), the bits of Triton's where that is at least 2^-126, and with fewer instructions: what is flushed to 0
// would vanish beside 1, and a quarter of the sum has a reciprocal that is never subnormal.
DEVICE float sigmoid(float v) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -1.4426950216293335f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaf(e, 0.25f, 0.25f)));
  return r * 0.25f;
}
DEVICE u32 packed(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
// Two E4M3 codes, to nearest, ties to even, 448 for what is more.
DEVICE u32 e4m3_pair(float low, float high) {
  unsigned short v;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
  return v;
}
// Of 8 by 8 numbers of 16 bits, a row of which four lanes have.
DEVICE u32 transposed(u32 v) {
  u32 t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(v));
  return t;
}
