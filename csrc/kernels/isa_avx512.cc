// AVX-512 F, BW, VL, DQ: float32 multiplication.
#include "gemm.h"
#include "rows.h"
#include "v_avx512.h"

namespace microscale {

#define MS_PRODUCT(format) product<Avx512F32, Decoder512<Avx512F32, format>>
extern const Kernels avx512_kernels = {
    MS_FP32,
    0,
    Avx512::kScratch,
    {MS_PRODUCT(MS_MXFP4), MS_PRODUCT(MS_MXFP6_E2M3), MS_PRODUCT(MS_MXFP6_E3M2), MS_PRODUCT(MS_MXFP8_E4M3),
     MS_PRODUCT(MS_MXFP8_E5M2), MS_PRODUCT(MS_MXINT8), MS_PRODUCT(MS_NVFP4), MS_PRODUCT(MS_FP8_BLOCK128)},
    nullptr,
    activate_rows<MS_FP32>,
    load_row<MS_FP32>,
    add_row,
    store_row,
};

}  // namespace microscale
