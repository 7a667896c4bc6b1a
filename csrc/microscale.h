/* The core's C ABI: plain integers and pointers, no exceptions, no torch. Thread-safe; nothing here keeps a pointer
 * beyond the call.
 *
 * A packed tensor [E, N, K] is one buffer, aligned to 64 bytes:
 *
 *   header   64 bytes, see `ms_header`
 *   for each expert, groups of 64 output columns: 4 panels of 16 columns (fewer in the last group), padded with zeros
 * to a multiple of 64 bytes, so that one stretch of memory holds all that 64 columns need, in the order of its use: for
 * each tile of 32 k: the codes of each panel's 16 columns x 32 k, then the byte scales of each panel block FP8: then
 * each panel's scales for all of K
 *
 * Every 32-bit word of a tile belongs to one column n = word % 16, so that vectors of any width find the same
 * columns in their lanes. With q = word / 16 and p the parity of k (bits 15..0 of the word: even k, bits 31..16: odd
 * k):
 *
 *   4 bits: 64 words. Nibble j (low first) of half p is k = 8 q + 2 j + p.
 *   8 bits: 128 words. Byte j (low first) of half p is k = 4 q + 2 j + p.
 *   6 bits: 64 words as for 4 bits hold each code's low four bits; then 32 words hold the high two: bits 2 i + 1, 2 i
 * of half p are k = 16 q + 2 i + p.
 *
 *   E8M0 scales of a panel and tile: byte [column].   E4M3 (NVFP4): byte [half][column], half = k / 16 % 2.
 *   float32 (block FP8): float [ceil(K / 128)], the panel's 16 columns share them.
 *
 * Columns beyond N and k beyond K hold zero codes and zero scales.
 */
#ifndef MICROSCALE_H
#define MICROSCALE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ms_format {
  MS_MXFP4,
  MS_MXFP6_E2M3,
  MS_MXFP6_E3M2,
  MS_MXFP8_E4M3,
  MS_MXFP8_E5M2,
  MS_MXINT8,
  MS_NVFP4,
  MS_FP8_BLOCK128,
  MS_FORMATS
};
enum ms_dtype { MS_BF16, MS_FP16, MS_FP32, MS_DTYPES };
/* Widest last; a machine that has one has all before it. */
enum ms_level { MS_PLAIN, MS_AVX2, MS_AVX512, MS_AVX512_BF16, MS_AMX, MS_LEVELS };
/* The kinds of microscale.activations, in its order. */
enum ms_kind { MS_SILU, MS_SWIGLU_OAI, MS_SWIGLU_STEP, MS_SITU, MS_GELU, MS_GELU_TANH, MS_RELU2, MS_KINDS };
enum ms_status { MS_OK, MS_BAD_ARGUMENT, MS_BAD_HEADER, MS_BAD_LEVEL, MS_NO_MEMORY };

#define MS_MAGIC 0x324c504353574d73ull /* "sMWSCPL2" */
/* A scale far from 1 or NaN, or a code that is infinite or NaN: decoded by a slower, exact path. */
#define MS_SPECIAL 1u

struct ms_header {
  uint64_t magic;
  int32_t format;
  uint32_t flags;
  int64_t experts, n, k;
  int64_t bytes; /* of the whole buffer, this header included */
  uint8_t zero[16];
};

/* What happens between w13 and w2; see microscale.activations. `limit` is +infinity where there is none. `stored`: 0,
 * or 1 + the format of ms_stored that each row of the result is rounded to before it is multiplied: FP8 only if the
 * activations are float32. */
struct ms_activation {
  int32_t kind, gated, interleaved;
  float alpha, beta, limit;
  int32_t stored;
};

/* Bytes of the packed buffer of [experts, n, k], or -1 for a format or size that cannot be. */
int64_t ms_packed_bytes(int format, int64_t experts, int64_t n, int64_t k);

/* Canonical codes uint8 [E, N, ceil(K bits / 8)] and scales (uint8 or float32 [E, ceil(N / rows), ceil(K / columns)]),
 * both contiguous, to the packed buffer, which is written whole, and back, bit for bit. */
int ms_pack(int format, int64_t experts, int64_t n, int64_t k, const uint8_t *codes, const void *scales, void *packed,
            int threads);
int ms_unpack(const void *packed, int64_t bytes, uint8_t *codes, void *scales, int threads);

/* y[m, n] = x[m, k] w^T * x_outer * outer + bias, in x's dtype, summed in float32. `outer` is float32 [n] or NULL
 * (tensor scale), `x_outer` float32 [m] or NULL (the same of x's rows), `bias` float32 [n] or NULL. x's rows are
 * contiguous and `x_stride` elements apart; y is dense. */
int ms_linear(int level, const void *w, const float *outer, int dtype, const void *x, int64_t x_stride,
              const float *x_outer, int64_t m, const float *bias, void *y, int threads);

/* The same with weights as they lie in a checkpoint: w [n, k] of `weight_dtype` (an ms_dtype), rows contiguous and
 * `w_stride` elements apart; `bias` [n] of the same dtype or NULL; x and y of `dtype`. Summed in float32; a row of y
 * depends on no other row and not on `threads`. Made for few rows: w is read once for every 8 or fewer. No pointer
 * needs to be aligned. */
int ms_dense(int level, int weight_dtype, const void *w, int64_t w_stride, int64_t n, int64_t k, const void *bias,
             int dtype, const void *x, int64_t x_stride, int64_t m, void *y, int threads);

/* The weighted sum over each token's experts: x [m, h], y [m, n] dense in `dtype`; `x_outer` as ms_linear's; ids [m, t]
 * local expert or -1; weights [m, t]; outers and biases float32 [E, rows], [E, n] or NULL. */
int ms_moe(int level, const void *w13, const float *outer13, const void *w2, const float *outer2, int dtype,
           const void *x, const float *x_outer, int64_t m, const int64_t *ids, const float *weights, int64_t t,
           const struct ms_activation *activation, const float *b13, const float *b2, int weight_on_input, void *y,
           int threads);

/* y[m, k] of dtype `to` = x[m, k] of `dtype` as each row reads back from a format of activations: an MX format, 32
 * numbers sharing a power of two; MS_NVFP4, whose outer multiplier is a row's; or MS_FP8_BLOCK128, of which 128 numbers
 * of a row share a float32 scale. Only float32 holds the last two, but any dtype holds NVFP4 where multipliers go to
 * `outer`, float32 [m], instead of into y; of other formats it is NULL. Numbers that share a block's scale with an
 * infinity or a NaN become NaN. x's rows are contiguous and `x_stride` elements apart; y is dense. */
int ms_stored(int level, int format, int dtype, const void *x, int64_t x_stride, int64_t m, int64_t k, int to, void *y,
              float *outer, int threads);

/* y = w * x / sqrt(mean of x^2 + epsilon), row by row in float32: x and y [m, n] dense in `dtype`, w [n] of
 * `weight_dtype`. On the calling thread: rows are few. */
int ms_rms_norm(int level, int dtype, const void *x, int64_t m, int64_t n, int weight_dtype, const void *w,
                float epsilon, void *y);

/* Attention of a few queries, each head on its own, summed in float32:
 * y[b, i, h] = sum over t of softmax_t(scale * q[b, h, i] . k[b, g, t]) * v[b, g, t], with g = h / (heads / key_heads).
 *
 * Strides are in elements: batch, head, token; a head's numbers are contiguous. `mask` is bytes, 0: token t is not
 * looked at, strides batch and query, or NULL; `sinks` [heads] are logits that take part in the softmax and have no
 * value, or NULL. Where nothing is looked at, y is 0. y [batch, queries, heads, value_width] is dense. */
struct ms_attention {
  int32_t dtype; /* of q, k, v, sinks and y */
  float scale;
  int64_t batch, heads, key_heads, queries, tokens, width, value_width;
  const void *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  const uint8_t *mask;
  int64_t mask_strides[2];
  const void *sinks;
  void *y;
};
int ms_attend(int level, const struct ms_attention *attention, int threads);

/* Router logits [m, experts] of `dtype` to `chosen` experts a row, best first, the lower index of equals; a NaN ranks
 * above every number. `weights` [m, chosen] are the chosen logits' softmax, or their shares in the softmax of all,
 * which `renormalize` divides by their sum; computed in float32 and rounded to the dtype `rounded`. */
enum ms_router { MS_TOPK_SOFTMAX, MS_SOFTMAX_TOPK, MS_ROUTERS };
int ms_route(int level, int dtype, const void *logits, int64_t m, int64_t experts, int router, int renormalize,
             int rounded, int64_t chosen, int64_t *ids, float *weights);

/* One token for each of m sequences of equal length through a model: steps in their order, over memory that the caller
 * keeps. Matrices are [m, ...], dense, of one dtype. What a model's modules round is rounded here. */
enum ms_step_kind {
  MS_STEP_EMBED,
  MS_STEP_NORM,
  MS_STEP_DENSE,
  MS_STEP_LINEAR,
  MS_STEP_ATTEND,
  MS_STEP_GATE,
  MS_STEP_ROUTE,
  MS_STEP_MOE,
  MS_STEP_KINDS
};
#define MS_STEP_PARTS 3
struct ms_step {
  int32_t kind;
  union {
    struct { /* y = rows `ids` [m] of table [count, n] */
      const void *table;
      int64_t count, n;
      const int64_t *ids;
      void *y;
    } embed;
    struct { /* x += more, unless that is NULL, and y as ms_rms_norm's; `twice`: rounded before w multiplies, too */
      void *x;
      const void *more;
      int32_t weight_dtype, twice;
      const void *w;
      int64_t n;
      float epsilon;
      void *y;
    } norm;
    struct { /* ms_dense with up to MS_STEP_PARTS weights side by side: y [m, sum of n] */
      int32_t weight_dtype, parts;
      int64_t k;
      const void *w[MS_STEP_PARTS], *bias[MS_STEP_PARTS];
      int64_t w_stride[MS_STEP_PARTS], n[MS_STEP_PARTS];
      const void *x;
      void *y;
    } dense;
    struct { /* ms_linear */
      const void *w;
      const float *outer, *bias;
      int64_t k;
      const void *x;
      void *y;
    } linear;
    struct {
      /* The token's queries and keys are normed (NULL: they are not), and the first `turned` numbers of each head
       * turned by its position's row of cos and sin [positions, turned / 2]: number i with number turned / 2 + i. Key
       * and value then go to slot position % slots of keys and values [m, key_heads, slots, width], and each query
       * attends to min(position + 1, slots) slots: y [m, heads * width]. q, k and v: a head's numbers are contiguous,
       * heads lie side by side, and `stride` numbers are between rows. */
      int64_t heads, key_heads, width, turned, slots, positions;
      const void *q, *k, *v;
      int64_t q_stride, k_stride, v_stride;
      int32_t weight_dtype, twice;
      const void *q_norm, *k_norm; /* [width] of weight_dtype */
      float epsilon, scale;
      const void *cos, *sin;
      void *keys, *values;
      const void *sinks; /* as ms_attention's */
      void *y;
    } attend;
    struct { /* y [m, n] = activation(gate) * up, whose rows are `stride` numbers apart; kinds that need no limit */
      struct ms_activation activation;
      int64_t n, stride;
      const void *gate, *up;
      void *y;
    } gate;
    struct { /* ms_route */
      const void *logits;
      int64_t experts, chosen;
      int32_t router, renormalize, rounded;
      int64_t *ids;
      float *weights;
    } route;
    struct { /* ms_moe */
      const void *w13, *w2;
      const float *outer13, *outer2, *b13, *b2;
      const void *x;
      const int64_t *ids;
      const float *weights;
      int64_t chosen;
      struct ms_activation activation;
      void *y;
    } moe;
  } of;
};
/* `seconds` [MS_STEP_KINDS] grows by what each kind of step took, or is NULL. Stops at the first step that fails. */
int ms_token(int level, int dtype, int64_t m, const struct ms_step *steps, int64_t count, int64_t position, int threads,
             double *seconds);

/* The widest level this processor and operating system allow; asks for the permission to use AMX tiles once. */
int ms_level(void);
/* The widest level that was compiled in: MS_PLAIN on other architectures. */
int ms_compiled_level(void);

/* What this machine can do at most, measured now: the two sides of a kernel's floor.
 *
 * Bytes a second at which `threads` threads together read the `bytes` bytes at `from` once, with the widest loads.
 * `from` is aligned to 64, `bytes` a multiple of 1024. Whether they come from memory or a cache is the caller's choice.
 */
int ms_read_rate(const void *from, int64_t bytes, int threads, double *rate);
/* FLOPs a second (a multiplication and an addition are two) of a level's widest multiplication, in registers alone:
 * bfloat16 from MS_AVX512_BF16 on, float32 below. Takes some 20 ms. */
int ms_multiply_rate(int level, int threads, double *rate);

#ifdef __cplusplus
}
#endif
#endif
