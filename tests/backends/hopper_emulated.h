// `hopper_ptx.h` for a CPU: every thread of a program is a fiber, which gives way where it would wait for others.
// Products happen when they are waited for and no sooner, from what registers and shared memory hold then; copies of a
// thread at once. A wait that never ends is found, and a thread that reads before it has waited for the kernel ahead.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <unordered_set>
#include <vector>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads, programs)
#define __shared__ static __attribute__((section("shared_memory")))
#define DYNAMIC_SHARED(name)  // one for all programs, below
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

struct Index {
  u32 x;
};
static Index threadIdx, blockIdx, gridDim, blockDim;

// ---- fibers -------------------------------------------------------------------------------------------------------
static ucontext_t scheduler_;
static std::vector<ucontext_t> fibers_;
static std::vector<u8> stacks_;
static std::vector<bool> done_;
static u64 progress_;  // counts whatever somebody may wait for

static void give_way() { swapcontext(&fibers_[threadIdx.x], &scheduler_); }
static std::function<bool()> ready_[1024];  // of each thread that waits, whether it need not any more
static void wait_for(std::function<bool()> ready) {
  if (ready()) return;
  ready_[threadIdx.x] = std::move(ready);
  give_way();
  ready_[threadIdx.x] = nullptr;
}

// So many threads meet; nobody goes on before all have come.
struct Meeting {
  u32 here = 0, round = 0;
  void meet(u32 threads) {
    const u32 mine = round;
    if (++here == threads)
      here = 0, round++, progress_++;
    else
      wait_for([this, mine] { return round != mine; });
  }
};
static std::map<u32, Meeting> meetings_;
static void meet_all(u32 key, u32 threads) { meetings_[key].meet(threads); }
static void __syncthreads() { meet_all(0, blockDim.x); }
static void meet(int group) { meet_all(1 + group, 128); }
static void meet_some(int barrier, int threads) { meet_all(barrier, threads); }

// ---- warps --------------------------------------------------------------------------------------------------------
static void meet_warp() { meet_all(300 + threadIdx.x / 32, 32); }
// What the lanes of a warp give each other.
template <typename T>
const T *of_warp(const T &v) {
  const u32 warp = threadIdx.x / 32;
  // Two places in turn: whoever gives the next value has met all again who look at this one.
  static T given[2][1024];
  T *values = given[meetings_[300 + warp].round % 2];
  values[threadIdx.x] = v;
  meet_warp();
  return values + 32 * warp;
}
static void __syncwarp() { meet_warp(); }
template <typename T>
T __shfl_sync(u32, T v, int) {
  return v;  // only of what is the same in a warp
}
static u32 __shfl_up_sync(u32, u32 v, u32 by) {
  const u32 lane = threadIdx.x % 32, *values = of_warp(v);
  return lane < by ? v : values[lane - by];
}
static u32 __shfl_xor_sync(u32, u32 v, u32 by) { return of_warp(v)[threadIdx.x % 32 ^ by]; }
static u32 __match_any_sync(u32, u32 v) {
  const u32 *values = of_warp(v);
  u32 same = 0;
  for (u32 i = 0; i < 32; i++) same |= static_cast<u32>(values[i] == v) << i;
  return same;
}
static u32 __reduce_add_sync(u32, u32 v) {
  const u32 *values = of_warp(v);
  u32 sum = 0;
  for (u32 i = 0; i < 32; i++) sum += values[i];
  return sum;
}
static int __popc(u32 v) { return __builtin_popcount(v); }

// ---- memory -------------------------------------------------------------------------------------------------------
alignas(1024) static u8 raw[256 << 10];
static u32 shared_address(const void *p) {
  return static_cast<u32>(reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(raw));
}
static u8 *at(u32 address) { return raw + static_cast<int32_t>(address); }

struct Barrier {
  u32 count, pending, phase;
  int64_t bytes;  // that are still to come
};
static std::map<u32, Barrier> barriers_;
static void barrier_init(u32 bar, u32 count) { barriers_[bar] = {count, count, 0, 0}; }
static void barriers_are_there() {}
static void barrier_changes(u32 bar, u32 arrivals, int64_t bytes) {
  Barrier &b = barriers_.at(bar);
  b.pending -= arrivals, b.bytes += bytes;
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
  progress_++;
}
static void barrier_arrive(u32 bar) { barrier_changes(bar, 1, 0); }
static void barrier_expect(u32 bar, u32 bytes) { barrier_changes(bar, 1, bytes); }
static void barrier_wait(u32 bar, u32 parity) {
  wait_for([&b = barriers_.at(bar), parity] { return b.phase != parity; });
}
static bool barrier_passed(u32 bar, u32 parity) { return barriers_.at(bar).phase != parity; }
static bool waited_[1024], early_;  // of each thread; any thread
static void wait_ahead() { waited_[threadIdx.x] = true; }
static void reads() { early_ |= !waited_[threadIdx.x]; }
static void copy16(u32 to, u64 from, int bytes) {
  reads();
  std::memset(at(to), 0, 16);
  std::memcpy(at(to), reinterpret_cast<const void *>(from), bytes);
}
static void copy4(u32 to, u64 from) {
  reads();
  std::memcpy(at(to), reinterpret_cast<const void *>(from), 4);
}
static void barrier_arrive_copied(u32 bar) { barrier_arrive(bar); }
// Of a copying engine, which is at once or as late as can be, and then begins with the last.
static bool engine_late_;
static std::vector<std::function<void()>> copies_;
// Whether a thread has waited for what others store, and copies do not see it yet; whether one copied any of it then.
static bool unseen_[1024], blind_;
static std::unordered_set<u64> stored_;  // by fours of bytes
static void copies_see_stores() { unseen_[threadIdx.x] = false; }
static void copy_some(std::function<void()> copy) {
  reads();
  if (engine_late_)
    copies_.push_back(std::move(copy));
  else
    copy();
}
static void copy_bytes(u32 to, u64 from, u32 bytes, u32 bar) {
  for (u32 i = 0; unseen_[threadIdx.x] && i < bytes; i += 4) blind_ |= stored_.count(from + i) > 0;
  copy_some([=] {
    std::memcpy(at(to), reinterpret_cast<const void *>(from), bytes);
    barrier_changes(bar, 0, -static_cast<int64_t>(bytes));
  });
}
// As the test says it, in the place of the driver's description.
struct Box {
  u64 x;
  int all, columns, rows;
};
static bool past_;  // whether a box of tokens reached past the last one, which takes long
static void copy_box(u32 to, const void *map, int column, int row, u32 bar) {
  Box box;
  std::memcpy(&box, map, sizeof box);
  past_ |= row + box.rows > box.all;
  copy_some([=] {
    for (int i = 0; i < box.rows; i++)
      for (int j = 0; j < 8; j++) {
        u8 *piece = at((to + i * 128 + j * 16) ^ (i % 8 << 4));
        std::memset(piece, 0, 16);
        if (row + i < box.all && column + 8 * j < box.columns) {
          const u64 first = u64(row + i) * box.columns + column + 8 * j;
          std::memcpy(piece, reinterpret_cast<const u8 *>(box.x) + 2 * first, 16);
        }
      }
    barrier_changes(bar, 0, -int64_t{128} * box.rows);
  });
}
static void copy_rows(u32 to, const void *map, int column, int row32, u32 bar) {
  Box box;
  std::memcpy(&box, map, sizeof box);
  copy_some([=] {
    for (int i = 0; i < 64; i++)
      for (int j = 0; j < 8; j++) {
        const int row = 32 * (row32 + i / 32) + 8 * (i % 8 / 2) + 2 * (i % 32 / 8) + i % 2;
        u8 *piece = at((to + i * 128 + j * 16) ^ (i % 8 << 4));
        std::memset(piece, 0, 16);
        if (row < box.all && column + 8 * j < box.columns)
          std::memcpy(piece, reinterpret_cast<const u8 *>(box.x) + 2 * (u64(row) * box.columns + column + 8 * j), 16);
      }
    barrier_changes(bar, 0, -int64_t{128} * 64);
  });
}
static void fetch_bytes(u64, u32) {}
static void fetch_map(const void *) {}
static bool elected() { return threadIdx.x % 32 == 0; }
static void copies_wait() {}
static void products_see_copies() {}
template <typename T>
T shared(u32 address) {
  T v;
  std::memcpy(&v, at(address), sizeof v);
  return v;
}
static uint4 shared16(u32 address) { return shared<uint4>(address); }
static uint2 shared8(u32 address) { return shared<uint2>(address); }
static u32 shared4(u32 address) { return shared<u32>(address); }
template <typename T>
T __ldg(const T *p) {
  reads();
  return *p;
}
static int load(const int *p) { return __ldg(p); }
static const int *tiles_used(u64 progress) { return reinterpret_cast<const int *>(progress) + 1; }
static u64 tile_done(u64 progress, int tile) { return progress + 4 * (2 + tile); }
static int left_;  // units that the program may still claim: programs run one after the other, and others want some
static int claim(u64 progress) {
  reads();
  return left_-- > 0 ? (*reinterpret_cast<int *>(progress))++ : 1 << 30;
}
static void add_one(u64 to) { ++*reinterpret_cast<int *>(to), progress_++; }
static void wait_until(u64 at, int least) {
  wait_for([=] { return *reinterpret_cast<const int *>(at) >= least; });
  unseen_[threadIdx.x] = true;
}
// What is stored is there late, and that of a group's last warps later still.
template <typename T>
void store(u64 to, T v) {
  for (u32 i = 0; i <= threadIdx.x % 128 / 64; i++) progress_++, give_way();
  std::memcpy(reinterpret_cast<void *>(to), &v, sizeof v);
  for (u32 i = 0; i < sizeof v; i += 4) stored_.insert(to + i);
}
static void store4_if(bool yes, u64 to, u32 v) {
  if (yes) store(to, v);
}
static void store8_if(bool yes, u64 to, uint2 v) {
  if (yes) store(to, v);
}

#include "hopper_emulated_products.h"

// ---- of a warp's lanes ---------------------------------------------------------------------------------------------
static u32 transposed(u32 v) {
  const u32 lane = threadIdx.x % 32, *values = of_warp(v);
  u32 t = 0;
  for (u32 c = 0; c < 2; c++)
    t |= (values[8 * (lane % 4) + 4 * c + lane / 8] >> 16 * (lane / 4 % 2) & 0xFFFF) << 16 * c;
  return t;
}

// Lane 8 * i + r says where row r of matrix i is, of which four lanes get a row.
static void load_matrices(u32 (&v)[4], u32 address) {
  const u32 lane = threadIdx.x % 32, *rows = of_warp(address);
  for (u32 i = 0; i < 4; i++) v[i] = shared4(rows[8 * i + lane / 4] + lane % 4 * 4);
}

struct Factors {
  u32 w[4], x[2];
};
// Rows g and g + 8, tokens 2 * t and 2 * t + 1, for lane 4 * g + t.
static void multiply_16(float *d, const u32 *w, u32 x0, u32 x1) {
  const u32 lane = threadIdx.x % 32;
  const Factors *all = of_warp<Factors>({{w[0], w[1], w[2], w[3]}, {x0, x1}});
  for (u32 odd = 0; odd < 2; odd++)
    for (u32 c = 0; c < 2; c++) {
      const Factors *rows = all + lane / 4 * 4, *tokens = all + 4 * (2 * (lane % 4) + c);
      double sum = 0;
      for (u32 k = 0; k < 16; k++) {
        const u32 pair = k % 8 / 2, high = k / 8, by = 16 * (k % 2);
        sum += static_cast<double>(wide_float(rows[pair].w[2 * high + odd] >> by & 0xFFFF)) *
               wide_float(tokens[pair].x[high] >> by & 0xFFFF);
      }
      float &to = d[2 * odd + c];
      to = static_cast<float>(to + sum);
    }
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------
static float at_most(float v, float limit) { return v > limit ? limit : v; }  // a NaN stays one
static float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }
static float __uint_as_float(u32 bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
static u32 __float_as_uint(float v) {
  u32 bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
static u32 e4m3_code(float v) {
  if (std::isnan(v)) return 0x7F;
  const u32 sign = std::signbit(v) ? 0x80 : 0;
  const float a = std::fmin(std::fabs(v), 448.0f);
  const int e = std::max(a > 0 ? std::ilogb(a) : -6, -6);
  return sign | (static_cast<u32>(e + 6) << 3) + static_cast<u32>(std::nearbyint(std::ldexp(a, 3 - e)));
}
static u32 e4m3_pair(float low, float high) { return e4m3_code(low) | e4m3_code(high) << 8; }
static u32 rounded_half(float v) {
  u32 bits;
  std::memcpy(&bits, &v, 4);
  if (std::isnan(v)) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static u32 packed(float low, float high) { return rounded_half(low) | rounded_half(high) << 16; }
static u32 __funnelshift_l(u32 low, u32 high, u32 by) { return high << by | low >> (32 - by); }
static u32 __byte_perm(u32 a, u32 b, u32 how) {
  const u64 both = static_cast<u64>(b) << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= static_cast<u32>(both >> 8 * (how >> 4 * i & 7) & 0xFF) << 8 * i;
  return r;
}
