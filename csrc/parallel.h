// Work shared among threads: the OpenMP pool of PyTorch, which an extension loaded after it finds already running.
#pragma once

#include <cstdint>

namespace ff {

// Throw std::runtime_error unless so many threads run, or can be started.
void require_threads(int threads);

// Keep the exception that is being handled, unless one is kept already; then throw it. Compiled without vector
// instructions, as all of the standard library that other files might share.
void keep_exception(void*& kept) noexcept;
void throw_kept(void*& kept);

// One copy of the code of a task: inlined into both loops below it would be compiled twice, with products and sums
// fused in different places, and the result would depend on the number of threads after all.
template <class Body>
__attribute__((noinline)) void run_task(const Body& body, int64_t task) { body(task); }

// Call body(task) for every task in [0, tasks), on up to `threads` threads, in no order. What a task computes must not
// depend on who computes it: sums across tasks go into a slot for each task, added up in order afterwards. What a task
// throws is thrown here, once all threads are done: an exception that leaves an OpenMP region ends the process.
template <class Body>
inline void parallel(int threads, int64_t tasks, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run_task(body, task);
    return;
  }
  require_threads(threads);
  void* thrown = nullptr;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    try {
      run_task(body, task);
    } catch (...) {
      keep_exception(thrown);
    }
  }
  if (thrown) throw_kept(thrown);
}

// The first row of part `part` when `rows` are dealt out to `parts` as evenly as they go.
inline int64_t part_begin(int64_t rows, int64_t parts, int64_t part) {
  return rows / parts * part + (part < rows % parts ? part : rows % parts);
}

}  // namespace ff
