// Multiply-adds that the processor does at the moment, all threads at once: independent chains in registers, no memory.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
constexpr int CHAINS = 12;
constexpr long STEPS = 40000;
volatile float sink;

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// GFLOP/s of one slice of work, a fraction of a millisecond.
double slice() {
  const Vec b = Vec{} + 0.999f, c = Vec{} + 0.001f;
  Vec a[CHAINS];
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) a[i] = Vec{} + static_cast<float>(i);
  const auto start = Clock::now();
  for (long step = 0; step < STEPS; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) a[i] = a[i] * b + c;
  }
  const double rate = 2.0 * CHAINS * LANES * STEPS / since(start) / 1e9;
  float sum = 0;
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) sum += a[i][0];
  sink = sum;
  return rate;
}

// GFLOP/s of all threads together: the sum of each thread's median slice while all of them work.
extern "C" double peak(int threads, double seconds) {
  std::atomic<int> ready{0};
  std::vector<double> medians(threads);
  std::vector<std::thread> crew;
  for (int t = 0; t < threads; ++t)
    crew.emplace_back([&, t] {
      std::vector<double> rates;
      ++ready;
      while (ready < threads) {}
      for (const auto start = Clock::now(); rates.empty() || since(start) < seconds;) rates.push_back(slice());
      std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
      medians[t] = rates[rates.size() / 2];
    });
  for (auto& thread : crew) thread.join();
  double sum = 0;
  for (const double median : medians) sum += median;
  return sum;
}
