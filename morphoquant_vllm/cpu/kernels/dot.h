// The instruction set of this build. A Dot gives vectors of kWidth int32, each the dot products of 4 channels of
// kWidth outputs: weights q + 8 as unsigned bytes, codes as signed ones. The 8 is taken back by Call::offset, so that
// neither nibbles need a sign nor codes an offset, and the integer group sum is exact.
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
