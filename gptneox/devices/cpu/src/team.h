// SPDX-License-Identifier: Apache-2.0
// Parallel loops. A step opens one parallel region and runs all its kernels in it (`Team`): waking
// threads that spin costs a tenth of opening a region for every kernel.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

#include "blocked.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gptneox {

// Waits for another thread: spins with a pause instruction and yields every 4096 spins, so that
// other work on the core still runs.
class SpinWait {
 public:
  void wait() {
    if (++count_ % 4096 == 0) {
      std::this_thread::yield();
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  uint32_t count_ = 0;
};

// The threads of one parallel region: a leader, which runs the step, and followers, which wait for
// its tasks.
class Team {
 public:
  // Run `leader` on this thread while torch's other threads follow. Rethrows an exception of any
  // thread.
  template <typename Leader>
  static void lead(Leader&& leader) {
    const MatrixUnitScope units;
    const int threads = at::get_num_threads();
    if (threads == 1 || current_ || at::in_parallel_region()) {
      leader();
      return;
    }
    Team team;
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t /*end*/) {
      if (begin > 0) {
        team.follow();
        return;
      }
      const LeaderScope scope(team);
      leader();
    });
  }

  // The team that this thread leads, else null.
  static Team* current() {
    return current_;
  }

  // Call `body` on this thread and on every follower that joins before this thread has finished.
  // Returns when all calls have returned.
  template <typename Body>
  void run(Body& body) {
    body_ = &body;
    call_ = [](void* pointer) { (*static_cast<Body*>(pointer))(); };
    {
      const TaskScope scope(*this);
      body();
    }
    if (failed_.exchange(false)) {
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

 private:
  // RAII: this thread leads; the destructor ends the loops of the followers.
  struct LeaderScope {
    Team& team;
    explicit LeaderScope(Team& led) : team(led) {
      current_ = &team;
    }
    ~LeaderScope() {
      current_ = nullptr;
      team.ended_.store(true);
    }
  };

  // RAII: opens the task; the destructor closes it and waits for every follower inside.
  struct TaskScope {
    Team& team;
    explicit TaskScope(Team& owner) : team(owner) {
      team.task_id_.store(++team.num_tasks_);
    }
    ~TaskScope() {
      team.task_id_.store(0);
      for (SpinWait spin; team.num_inside_.load() > 0;) {
        spin.wait();
      }
    }
  };

  void follow() {
    const MatrixUnitScope units;
    int64_t last_id = 0;
    for (SpinWait spin; !ended_.load(std::memory_order_relaxed);) {
      const int64_t id = task_id_.load(std::memory_order_relaxed);
      if (id == 0 || id == last_id) {
        spin.wait();
        continue;
      }
      num_inside_.fetch_add(1);
      // Read again: the task may have closed meanwhile. If it is open now, the leader waits for
      // this thread before the task's body goes out of scope.
      if (const int64_t open_id = task_id_.load(); open_id != 0) {
        last_id = open_id;
        try {
          call_(body_);
        } catch (...) {
          if (!failed_.exchange(true)) {
            failure_ = std::current_exception();
          }
        }
      }
      num_inside_.fetch_sub(1);
    }
  }

  static inline thread_local Team* current_ = nullptr;
  // Each on a cache line of its own: all threads read the first, all write the second.
  alignas(64) std::atomic<int64_t> task_id_{0}; // the open task, or 0
  std::atomic<bool> ended_{false};
  alignas(64) std::atomic<int64_t> num_inside_{0}; // followers that run or are about to
  alignas(64) int64_t num_tasks_ = 0;
  void* body_ = nullptr;
  void (*call_)(void*) = nullptr;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

// Guided self-scheduling: threads take chunks of work from a shared counter. A preempted thread
// takes fewer chunks, and chunks shrink towards the end, so that all threads finish together.
class WorkQueue {
 public:
  WorkQueue(int64_t total, int64_t largest)
      : total_(total), largest_(std::max<int64_t>(1, largest)), threads_(at::get_num_threads()) {}

  bool take(int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= total_) {
        return false;
      }
      const int64_t share = (total_ - begin) / (2 * threads_);
      end = begin + std::clamp<int64_t>(share, 1, largest_);
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t total_, largest_, threads_;
};

// Call `body` on all threads; `body` divides the work, for example by a WorkQueue. Inside a Team,
// late followers may miss a task, so `body` must not rely on the number of calls.
template <typename Body>
inline void on_all_threads(Body&& body) {
  const int threads = at::get_num_threads();
  if (Team* team = Team::current()) {
    team->run(body);
  } else if (threads == 1) {
    const MatrixUnitScope units;
    body();
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const MatrixUnitScope units;
      for (int64_t i = begin; i < end; ++i) {
        body();
      }
    });
  }
}

// Call `body(begin, end)` in parallel for ranges of at most `grain` that cover [0, count).
template <typename Body>
inline void for_ranges(int64_t count, int64_t grain, Body&& body) {
  if (count <= grain || at::get_num_threads() == 1) {
    body(0, count);
    return;
  }
  WorkQueue queue(count, grain);
  on_all_threads([&] {
    int64_t begin, end;
    while (queue.take(begin, end)) {
      body(begin, end);
    }
  });
}

} // namespace gptneox
