// SPDX-License-Identifier: Apache-2.0
// Work for all threads. A step of many small parts keeps torch's threads together from beginning to
// end: handing a part to threads that wait for it costs a tenth of starting them anew.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gptneox {

// Waiting for another thread: for a moment attentively, then so that whoever shares the core gets
// on.
class Patience {
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

class Team {
 public:
  // Call `leader` here while torch's other threads wait for what it hands out. What any of them
  // throws is thrown here.
  template <typename Leader>
  static void lead(Leader&& leader) {
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
      const Leading leading(team);
      leader();
    });
  }

  // The team that this thread leads, or null.
  static Team* current() {
    return current_;
  }

  // Call `body` here and on every other thread that comes in time, until all have returned.
  template <typename Body>
  void run(Body& body) {
    body_ = &body;
    call_ = [](void* known) { (*static_cast<Body*>(known))(); };
    {
      const Opened opened(*this);
      body();
    }
    if (failed_.exchange(false)) {
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

 private:
  struct Leading {
    Team& team;
    explicit Leading(Team& led) : team(led) {
      current_ = &team;
    }
    ~Leading() {
      current_ = nullptr;
      team.ended_.store(true);
    }
  };

  // While one lives, the others may begin; it goes when all that did have returned.
  struct Opened {
    Team& team;
    explicit Opened(Team& of) : team(of) {
      team.open_.store(++team.number_);
    }
    ~Opened() {
      team.open_.store(0);
      for (Patience patience; team.inside_.load() > 0;) {
        patience.wait();
      }
    }
  };

  void follow() {
    int64_t done = 0;
    for (Patience patience; !ended_.load(std::memory_order_relaxed);) {
      const int64_t seen = open_.load(std::memory_order_relaxed);
      if (seen == 0 || seen == done) {
        patience.wait();
        continue;
      }
      inside_.fetch_add(1);
      // Looked at again: from now on the leader waits before anything goes.
      if (const int64_t number = open_.load(); number != 0) {
        done = number;
        try {
          call_(body_);
        } catch (...) {
          if (!failed_.exchange(true)) {
            failure_ = std::current_exception();
          }
        }
      }
      inside_.fetch_sub(1);
    }
  }

  static inline thread_local Team* current_ = nullptr;
  alignas(64) std::atomic<int64_t> open_{0}; // number of what is to be done, or 0
  std::atomic<bool> ended_{false};
  alignas(64) std::atomic<int64_t> inside_{0};
  alignas(64) int64_t number_ = 0;
  void* body_ = nullptr;
  void (*call_)(void*) = nullptr;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

// Threads take groups of work from a counter, so that one that is disturbed does less. Groups
// shrink towards the end, so that all end together.
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

// Call `body` on all threads, which share out work among themselves. In a team not all may come.
template <typename Body>
inline void on_all_threads(Body&& body) {
  const int threads = at::get_num_threads();
  if (Team* team = Team::current()) {
    team->run(body);
  } else if (threads == 1) {
    body();
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        body();
      }
    });
  }
}

// Call `body(begin, end)` for ranges of about `grain` that make up [0, count).
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
