// What OpenMP would end the process for: a thread that cannot be started, and an exception that leaves its region.
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../parallel.h"

namespace ff {

namespace {

std::atomic<int> started{1};  // that many are known to start
std::mutex keeping;

static_assert(sizeof(std::exception_ptr) == sizeof(void*), "an exception_ptr is kept in the room of a pointer");

}  // namespace

void require_threads(int threads) {
  if (threads <= started.load(std::memory_order_relaxed)) return;
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::vector<std::thread> all;
  const auto end = [&] {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      done = true;
    }
    changed.notify_all();
    for (std::thread& thread : all) thread.join();
  };
  try {
    all.reserve(static_cast<size_t>(threads));
    while (static_cast<int>(all.size()) < threads - 1)
      all.emplace_back([&] {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return done; });
      });
  } catch (const std::system_error& error) {
    const std::string running = std::to_string(all.size() + 1);
    end();
    throw std::runtime_error("only " + running + " of " + std::to_string(threads) + " threads could be started (" +
                             error.what() + "): ask for fewer, by threads= or torch.set_num_threads");
  } catch (...) {
    end();
    throw;
  }
  end();
  started.store(threads, std::memory_order_relaxed);
}

void keep_exception(void*& kept) noexcept {
  const std::lock_guard<std::mutex> lock(keeping);
  if (!kept) new (&kept) std::exception_ptr(std::current_exception());
}

void throw_kept(void*& kept) {
  auto* held = std::launder(reinterpret_cast<std::exception_ptr*>(&kept));
  const std::exception_ptr thrown = *held;
  held->~exception_ptr();
  std::rethrow_exception(thrown);
}

}  // namespace ff
