// GFLOP/s of multiply-adds that one core does (the median of some rounds): independent chains in registers, no memory.
#include <algorithm>
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
constexpr int CHAINS = 12;
constexpr long STEPS = 400000;
constexpr int ROUNDS = 51;

int main() {
  const Vec b = Vec{} + 0.999f, c = Vec{} + 0.001f;
  double rates[ROUNDS];
  float sum = 0;
  for (double& rate : rates) {
    Vec a[CHAINS];
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) a[i] = Vec{} + static_cast<float>(i);
    const auto start = std::chrono::steady_clock::now();
    for (long step = 0; step < STEPS; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < CHAINS; ++i) a[i] = a[i] * b + c;
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    rate = 2.0 * CHAINS * LANES * STEPS / seconds / 1e9;
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sum += a[i][0];
  }
  std::nth_element(rates, rates + ROUNDS / 2, rates + ROUNDS);
  std::printf("%.3f %g\n", rates[ROUNDS / 2], sum);
}
