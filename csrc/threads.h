// A pool of threads that wait briefly by spinning and then sleep, so that they take nothing from others when idle.
#pragma once

#include <cstddef>

namespace bitvla {

int num_threads();
void set_num_threads(int count);

// Runs body(context, 0 .. tasks - 1) on up to `threads` threads, the caller among them. A thread that is free takes the
// next task, so slow or busy cores get fewer; while another caller has the pool, this one works alone.
void parallel(int threads, size_t tasks, void (*body)(const void* context, size_t task), const void* context);

template <class Body>
void parallel(int threads, size_t tasks, const Body& body) {
  parallel(
      threads, tasks, [](const void* context, size_t task) { (*static_cast<const Body*>(context))(task); }, &body);
}

}  // namespace bitvla
