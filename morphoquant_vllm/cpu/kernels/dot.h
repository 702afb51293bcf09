// The instruction set of this build. A Dot computes vectors of kWidth int32: dot products over 4 channels for kWidth
// outputs. Weights are q + 8 as unsigned bytes, 8-bit ones q + 128, and codes are signed bytes. Call::offset subtracts
// the 8 or 128 again. So weights need no sign, codes need no offset, and the integer group sum is exact.
#pragma once

#if defined(MORPHOQUANT_AVX512_VNNI)
#include "dot_avx512.h"
namespace morphoquant {
using Dot = DotAvx512Vnni;
}
#elif defined(MORPHOQUANT_AVX_VNNI)
#include "dot_avx2.h"
namespace morphoquant {
using Dot = DotAvxVnni;
}
#elif defined(MORPHOQUANT_AVX2)
#include "dot_avx2.h"
namespace morphoquant {
using Dot = DotAvx2;
}
#else
#error "cpu/build.py names the instruction set"
#endif
