// Half precision for the emulation; see cuda_runtime.h.
#pragma once

#include <cstring>

struct __half {
  _Float16 value;
};
inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}
