#include "ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitvla {
namespace {

// Work below which waking another thread costs more than it saves.
constexpr size_t kMinElements = 16 * 1024;    // per thread, read or written once
constexpr size_t kMinProducts = 1024 * 1024;  // per thread, int8 multiply-adds
constexpr size_t kMinFloatProducts = 128 * 1024;

// Becomes Python's MemoryError.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(size_t bytes)
      : message_("the kernels need " + std::to_string((bytes + 999999) / 1000000) + " MB to work in") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// A thread's own memory, kept from call to call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      constexpr size_t kHugePage = size_t{2} << 20;
      if (size_ >= kHugePage) size_ = (size_ + kHugePage - 1) / kHugePage * kHugePage;
      data_ = std::aligned_alloc(size_ >= kHugePage ? kHugePage : 4096, size_);
#if defined(__linux__)
      if (data_ && size_ >= kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
#endif
      if (!data_) throw NoMemory(std::exchange(size_, 0));
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch task_scratch, call_scratch;

int threads_for(size_t work, size_t least) {
  return static_cast<int>(std::clamp<size_t>(work / least, 1, static_cast<size_t>(num_threads())));
}

// [0, count) cut into nearly equal tasks, at multiples of `unit`: one for one thread, else some for each, so that a
// thread that is slow or late leaves tasks to the others.
class Tasks {
 public:
  Tasks(size_t count, size_t unit, int threads, size_t each = 4)
      : total_(count), unit_(unit), units_((count + unit - 1) / unit),
        count(threads == 1 ? 1 : std::clamp<size_t>(units_, 1, each * threads)) {}

  Range operator[](size_t task) const { return {edge(task), edge(task + 1)}; }

 private:
  size_t edge(size_t task) const { return std::min(total_, units_ * task / count * unit_); }

  size_t total_, unit_, units_;

 public:
  size_t count;
};

const Kernels& initial() {
  const char* name = std::getenv("BITVLA_ISA");
  if (!name || !*name) return *available_kernels()[0];
  if (const Kernels* kernels = find_kernels(name)) return *kernels;
  std::string message = "BITVLA_ISA=" + std::string(name) + " is unknown or not supported here; available:";
  for (const Kernels* const* k = available_kernels(); *k; ++k) message += std::string(" ") + (*k)->name;
  throw std::runtime_error(message);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& active() {
  if (!chosen) chosen = &initial();
  return *chosen;
}

void set_active(const Kernels& kernels) { chosen = &kernels; }

void run_rows(const RowJob& job, size_t tokens) {
  const Kernels& kernels = active();
  const int threads = threads_for(tokens * job.width, kMinElements);
  const Tasks tasks(tokens, 1, threads);
  parallel(threads, tasks.count, [&](size_t task) {
    kernels.rows(job, tasks[task], static_cast<float*>(task_scratch.get(padded(job.width) * sizeof(float))));
  });
}

void run_ternary(const TernaryJob& job, size_t tokens) {
  const Kernels& kernels = active();
  const int threads = threads_for(tokens * job.rows * job.cols, kMinProducts);
  // By stripes of 4 tiles; where those are too few, the tokens are cut as well, though each part unpacks the weights.
  const Tasks stripes(tiles(job.rows), 4, threads, tokens <= 24 ? 4 : 64);
  const size_t wanted = threads == 1 ? 1 : 2 * threads;
  const size_t most = std::max<size_t>(tokens / 24, 1);
  const size_t cuts = std::clamp<size_t>((wanted + stripes.count - 1) / stripes.count, 1, most);
  const Tasks parts(tokens, 6, static_cast<int>(cuts), 1);
  parallel(threads, stripes.count * parts.count, [&](size_t task) {
    kernels.ternary(job, stripes[task / parts.count], parts[task % parts.count], task_scratch.get(kTernaryScratch));
  });
}

void run_linear(const LinearJob& job, size_t tokens) {
  const Kernels& kernels = active();
  const int threads = threads_for(tokens * job.rows * job.cols, kMinFloatProducts);
  const bool by_tokens = job.rows < static_cast<size_t>(24 * threads) && tokens >= static_cast<size_t>(threads);
  const Tasks tasks(by_tokens ? tokens : job.rows, by_tokens ? 4 : 12, threads);
  parallel(threads, tasks.count, [&](size_t task) {
    const Range rows{0, job.rows}, all{0, tokens};
    kernels.linear(job, by_tokens ? rows : tasks[task], by_tokens ? tasks[task] : all);
  });
}

void run_rope(const RopeJob& job, size_t tokens) {
  const Kernels& kernels = active();
  const int threads = threads_for(tokens * job.heads * job.dim, kMinElements);
  const Tasks tasks(tokens, 1, threads);
  parallel(threads, tasks.count, [&](size_t task) { kernels.rope(job, tasks[task]); });
}

void run_append(const AttentionJob& job, size_t start) {
  const size_t width = padded(job.dim);
  for (size_t i = 0; i < job.keys; ++i) {
    const size_t at = start + i;
    for (size_t head = 0; head < job.kv_heads; ++head) {
      const float* k = job.k + i * job.k_stride + head * job.dim;
      const float* v = job.v + i * job.v_stride + head * job.dim;
      float* packed_k = job.packed_k + head * job.packed_k_stride + at / kTile * job.dim * kTile + at % kTile;
      for (size_t d = 0; d < job.dim; ++d) packed_k[d * kTile] = k[d];
      std::copy_n(v, job.dim, job.packed_v + head * job.packed_v_stride + at * width);
    }
  }
}

void run_attention(AttentionJob job) {
  const Kernels& kernels = active();
  const bool packed = !job.k;
  if (!packed) {
    // Where they are read only once, values need no copy.
    const bool in_place = query_blocks(job) == 1 && job.dim % kLanes == 0;
    job.packed_k_stride = padded(job.keys) * job.dim;
    job.packed_v_stride = in_place ? 0 : job.keys * padded(job.dim);
    const size_t size = job.kv_heads * (job.packed_k_stride + job.packed_v_stride);
    job.packed_k = static_cast<float*>(call_scratch.get(size * sizeof(float)));
    job.packed_v = in_place ? nullptr : job.packed_k + job.kv_heads * job.packed_k_stride;
  }
  const int threads = threads_for(job.queries * job.keys * job.heads * job.dim, kMinFloatProducts);
  if (!packed) {
    const Tasks groups(job.kv_heads * tiles(job.keys), 1, threads);
    parallel(threads, groups.count, [&](size_t task) { kernels.attention_pack(job, groups[task]); });
  }
  const Tasks blocks(job.kv_heads * query_blocks(job), 1, threads, 64);
  parallel(threads, blocks.count, [&](size_t task) {
    kernels.attention(job, blocks[task], task_scratch.get(kAttentionScratch));
  });
}

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

double peak_int8_gmacs(double seconds, int threads) {
  const Kernels& kernels = active();
  std::vector<double> rates(threads);
  parallel(threads, threads, [&](size_t part) {
    const auto start = Clock::now();
    uint64_t macs = 0;
    do macs += kernels.dot_peak(20000);
    while (since(start) < seconds);
    rates[part] = macs / since(start) * 1e-9;
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

double peak_bandwidth_gbs(double seconds, size_t megabytes, int threads) {
  constexpr size_t kChunk = 1 << 16;  // words
  static_assert(sizeof(uint64_t) * kChunk == 512 * 1024);
  const size_t words = std::max<size_t>(megabytes * 1000000 / sizeof(uint64_t) / kChunk, threads) * kChunk;
  Scratch memory;
  uint64_t* data = static_cast<uint64_t*>(memory.get(words * sizeof(uint64_t)));
  std::fill_n(data, words, 1);
  std::vector<double> rates(threads);
  const Tasks tasks(words, kChunk, threads, 1);
  parallel(threads, tasks.count, [&](size_t part) {
    const Range range = tasks[part];
    const auto start = Clock::now();
    uint64_t total[16] = {};
    size_t read = 0;
    do {
      for (size_t chunk = range.begin; chunk < range.end && since(start) < seconds; chunk += kChunk) {
        for (size_t i = chunk; i < chunk + kChunk; i += 16) {
          __builtin_prefetch(data + i + 768);
          __builtin_prefetch(data + i + 776);
          for (size_t j = 0; j < 16; ++j) total[j] += data[i + j];
        }
        read += kChunk;
      }
    } while (since(start) < seconds);
    for (uint64_t& t : total) asm volatile("" ::"r"(t));
    rates[part] = read * sizeof(uint64_t) / since(start) * 1e-9;
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace bitvla
