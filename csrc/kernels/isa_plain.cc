// Any processor: the compiler's vectors, codes decoded through tables.
#include "gemm.h"
#include "rows.h"
#include "v_plain.h"

namespace microscale {

#define MS_PRODUCT(format) product<Plain, PlainDecoder<format>>
extern const Kernels plain_kernels = {
    MS_FP32,
    0,
    Plain::kScratch,
    {MS_PRODUCT(MS_MXFP4), MS_PRODUCT(MS_MXFP6_E2M3), MS_PRODUCT(MS_MXFP6_E3M2), MS_PRODUCT(MS_MXFP8_E4M3),
     MS_PRODUCT(MS_MXFP8_E5M2), MS_PRODUCT(MS_MXINT8), MS_PRODUCT(MS_NVFP4), MS_PRODUCT(MS_FP8_BLOCK128)},
    nullptr,
    activate_rows<MS_FP32>,
    load_row<MS_FP32>,
    add_row,
    store_row,
};

}  // namespace microscale
