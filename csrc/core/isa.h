// Runtime dispatch between the builds of a CPU kernel file for scalar, AVX2 and AVX-512.
#pragma once

namespace frd {

enum class Isa : int { scalar, avx2, avx512 };

// The best instruction set of this CPU, capped by the environment variable FRD_CPU_ISA=scalar|avx2|avx512.
Isa cpu_isa();
const char* isa_name(Isa isa);

}  // namespace frd

// Declares frd::fn(), which returns the function table of the chosen build. Each *kernel.cpp defines
// FRD_ISA::fn().
#if defined(__x86_64__)
#define FRD_ISA_TABLE(Table, fn) \
  namespace frd {                \
  namespace scalar {             \
  const Table& fn();             \
  }                              \
  namespace avx2 {               \
  const Table& fn();             \
  }                              \
  namespace avx512 {             \
  const Table& fn();             \
  }                              \
  inline const Table& fn() {     \
    switch (cpu_isa()) {         \
      case Isa::avx512:          \
        return avx512::fn();     \
      case Isa::avx2:            \
        return avx2::fn();       \
      default:                   \
        return scalar::fn();     \
    }                            \
  }                              \
  }
#else
#define FRD_ISA_TABLE(Table, fn)                    \
  namespace frd {                                   \
  namespace scalar {                                \
  const Table& fn();                                \
  }                                                 \
  inline const Table& fn() { return scalar::fn(); } \
  }
#endif
