#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>

namespace bitvla {
namespace {

constexpr std::chrono::microseconds kSpin{50};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `done()` holds or the time for spinning is over.
template <class Done>
void spin_until(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
}

class Pool {
 public:
  void run(int threads, uint32_t tasks, void (*body)(const void*, size_t), const void* context) {
    const uint64_t job = (next_.load() >> 32) + 1;
    next_.store(job << 32 | UINT32_MAX);  // closed: nobody may take a task while the job is being written
    done_.store(0);
    body_.store(body);
    context_.store(context);
    tasks_.store(tasks);
    next_.store(job << 32);
    while (static_cast<int>(workers_.size()) < threads - 1) {
      workers_.push_back(std::make_unique<Worker>());
      try {
        std::thread([this, worker = workers_.back().get()] { wait_for_work(*worker); }).detach();
      } catch (const std::system_error&) {  // a limit of memory or of threads: those that there are do the work
        workers_.pop_back();
        break;
      }
    }
    for (size_t i = 0; i < std::min<size_t>(threads - 1, workers_.size()); ++i) {
      workers_[i]->calls.fetch_add(1);
      workers_[i]->calls.notify_one();
    }
    take_tasks();
    spin_until([&] { return done_.load() == tasks; });
    for (uint32_t done; (done = done_.load()) != tasks;) done_.wait(done);
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> calls{0};
  };

  void wait_for_work(Worker& worker) {
    for (uint32_t seen = 0;; seen = worker.calls.load()) {
      take_tasks();
      spin_until([&] { return worker.calls.load() != seen; });
      worker.calls.wait(seen);
    }
  }

  // A worker may come late, to a job that is over or to the next one. What it reads of the job is valid if the exchange
  // succeeds: the number of the job was still the same and a task was left, so that run() had not returned.
  void take_tasks() {
    uint64_t next = next_.load();
    for (;;) {
      const auto body = body_.load();
      const void* context = context_.load();
      const uint32_t tasks = tasks_.load(), task = static_cast<uint32_t>(next);
      if (task >= tasks) return;
      if (!next_.compare_exchange_weak(next, next + 1)) continue;
      try {
        body(context, task);
      } catch (...) {  // no memory: for the caller, whichever thread it met
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      if (done_.fetch_add(1) + 1 == tasks) done_.notify_one();
      next = next_.load();
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<uint64_t> next_{0};  // the number of the job, and in the low half its next task
  std::atomic<uint32_t> tasks_{0}, done_{0};
  std::atomic<void (*)(const void*, size_t)> body_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

Pool* pool = nullptr;  // never destroyed: its threads may outlive static objects
std::mutex pool_mutex;
std::atomic<int> wanted{0};

// Threads do not survive a fork: the child starts a pool of its own.
[[maybe_unused]] const int fork_handlers = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                                                          [] {
                                                            pool = nullptr;
                                                            pool_mutex.unlock();
                                                          });

// Physical cores this process may use, no more than its control group's share of time.
int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &set)) continue;
      const std::string siblings =
          "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
      std::string core;
      if (!std::getline(std::ifstream(siblings), core)) core = "cpu" + std::to_string(cpu);
      cores.insert(core);
    }
    double quota = 0, period = 0;
    std::ifstream limit("/sys/fs/cgroup/cpu.max");
    int count = static_cast<int>(cores.size());
    if (limit >> quota >> period && period > 0 && quota / period < count) count = static_cast<int>(quota / period);
    return count > 0 ? count : 1;
  }
#endif
  const int count = static_cast<int>(std::thread::hardware_concurrency());
  return count > 0 ? count : 1;
}

}  // namespace

int num_threads() {
  if (wanted.load() == 0) {
    int unset = 0;
    wanted.compare_exchange_strong(unset, usable_cores());
  }
  return wanted.load();
}

void set_num_threads(int count) { wanted.store(count); }

void parallel(int threads, size_t tasks, void (*body)(const void*, size_t), const void* context) {
  std::unique_lock<std::mutex> lock;
  if (threads > 1 && tasks > 1) lock = std::unique_lock(pool_mutex, std::try_to_lock);
  if (!lock.owns_lock()) {
    for (size_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  if (!pool) pool = new Pool;
  pool->run(threads, static_cast<uint32_t>(tasks), body, context);
}

}  // namespace bitvla
