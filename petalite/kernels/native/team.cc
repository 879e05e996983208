#include "team.h"

#include <time.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "common.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#endif

namespace petalite {
namespace {

constexpr int64_t kBarrierSpinNs = 30'000;   // of waiting for workers that are at their last piece
constexpr int64_t kIdleSpinNs = 60'000;      // of waiting for the next call
constexpr int64_t kLostNs = 15'000;          // between two looks at the clock: was the core somebody else's?
constexpr int64_t kTakenNs = 1'000'000;      // it was, if so much of the time for work is missing,
constexpr int64_t kTakenShare = 8;           // and an eighth of it,
constexpr int64_t kWatchedNs = 20'000'000;   // since the count began, which it does anew after so long
constexpr int64_t kCrowdedNs = 20'000'000;   // for so long afterwards nobody spins

int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

// How long this thread was without a core while it had work. What a hypervisor takes does not count, nor a moment of some
// daemon's: nobody waits for the core then. Another program that computes does.
class Watch {
  public:
    // The thread leaves its work, for other things or to sleep; and comes back.
    void leave() { left_ = now_ns(), cpu_left_ = cpu_ns(); }
    void come_back() { began_ += now_ns() - left_, cpu_before_ += cpu_ns() - cpu_left_; }

    // Whether another program computes on this core.
    bool taken(int64_t now) {
        const int64_t cpu = cpu_ns(), elapsed = now - began_, lost = elapsed - (cpu - cpu_before_);
        const bool taken = lost > kTakenNs && lost > elapsed / kTakenShare;
        if (taken || elapsed > kWatchedNs) began_ = now, cpu_before_ = cpu;
        return taken;
    }

  private:
    static int64_t cpu_ns() {
        timespec spent{};
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &spent);
        return spent.tv_sec * int64_t(1'000'000'000) + spent.tv_nsec;
    }

    int64_t began_ = now_ns(), cpu_before_ = cpu_ns(), left_ = began_, cpu_left_ = cpu_before_;
};

thread_local Watch watch;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A counter that threads wait on until it moves away from a value.
class Signal {
  public:
    uint32_t load() const { return value_.load(std::memory_order_acquire); }

    void advance() {
        value_.fetch_add(1);
        if (sleepers_.load() == 0) return;
#if defined(__linux__)
        syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
        std::lock_guard<std::mutex> lock(mutex_);
        moved_.notify_all();
#endif
    }

    // Returns once the value is another. Spins for `spin_ns` at most, not at all while the machine is crowded.
    void wait(uint32_t old, int64_t spin_ns, std::atomic<int64_t>& crowded_until) {
        int64_t began = now_ns(), before = began;
        if (began >= crowded_until.load(std::memory_order_relaxed)) {
            while (load() == old) {
                for (int i = 0; i < 8; ++i) relax();
                const int64_t now = now_ns();
                if (now - before > kLostNs && watch.taken(now)) {
                    crowded_until.store(now + kCrowdedNs, std::memory_order_relaxed);
                    break;
                }
                if (now - began > spin_ns) break;
                before = now;
            }
        }
        if (load() != old) return;
        watch.leave();
        sleepers_.fetch_add(1);
#if defined(__linux__)
        while (value_.load() == old)
            syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
        {
            std::unique_lock<std::mutex> lock(mutex_);
            moved_.wait(lock, [&] { return value_.load() != old; });
        }
#endif
        sleepers_.fetch_sub(1);
        watch.come_back();
    }

  private:
    alignas(64) std::atomic<uint32_t> value_{0};
    std::atomic<int32_t> sleepers_{0};
#if !defined(__linux__)
    std::mutex mutex_;
    std::condition_variable moved_;
#endif
};

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

struct Memory {
    char* data = nullptr;
    size_t bytes = 0;
    ~Memory() { ::operator delete(data, std::align_val_t(64)); }
};

}  // namespace

class Team {
  public:
    explicit Team(int n) : memory_(size_t(n)), taken_(new Counter[size_t(n)]) {
        for (int i = 1; i < n; ++i) threads_.emplace_back([this, i] { serve(i); });
    }

    ~Team() {
        job_ = nullptr;
        begun_.advance();
        for (std::thread& thread : threads_) thread.join();
    }

    int size() const { return int(memory_.size()); }

    void run(void (*job)(Worker&, void*), void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        Worker worker(*this, 0, size());
        if (size() == 1) return job(worker, context);
        watch.come_back();
        job_ = job, context_ = context;
        begun_.advance();
        job(worker, context);
        barrier();
        watch.leave();
    }

    void barrier() {
        const int n = size();
        if (n == 1) return;
        const uint32_t met = met_.load();
        if (arrived_.fetch_add(1) + 1 == n) {
            arrived_.store(0, std::memory_order_relaxed);
            for (int i = 0; i < n; ++i) taken_[i].value.store(0, std::memory_order_relaxed);
            met_.advance();
        } else {
            met_.wait(met, kBarrierSpinNs, crowded_until_);
        }
    }

    int64_t take(int whose) { return taken_[whose].value.fetch_add(1, std::memory_order_relaxed); }

    void* local(int index, size_t bytes) {
        Memory& memory = memory_[size_t(index)];
        if (memory.bytes < bytes) {
            ::operator delete(memory.data, std::align_val_t(64));
            memory.data = nullptr, memory.bytes = 0;
            memory.data = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
            memory.bytes = bytes;
        }
        return memory.data;
    }

  private:
    void serve(int index) {
        Worker worker(*this, index, size());
        for (uint32_t seen = 0;; ++seen) {
            begun_.wait(seen, kIdleSpinNs, crowded_until_);
            if (!job_) return;
            job_(worker, context_);
            barrier();
        }
    }

    alignas(64) std::atomic<int32_t> arrived_{0};  // at the barrier
    Signal met_;                                   // moves when all have arrived
    Signal begun_;                                 // moves when there is a job
    alignas(64) std::atomic<int64_t> crowded_until_{0};
    void (*job_)(Worker&, void*) = nullptr;
    void* context_ = nullptr;
    std::mutex turn_;
    std::vector<Memory> memory_;
    std::unique_ptr<Counter[]> taken_;  // how many pieces of each worker's share
    std::vector<std::thread> threads_;
};

void Worker::barrier() { team_.barrier(); }
int64_t Worker::take(int whose) { return team_.take(whose); }
void* Worker::local(size_t bytes) { return team_.local(index, bytes); }

void team_run(Team* team, void (*job)(Worker&, void*), void* context) { team->run(job, context); }
int team_size(const Team* team) { return team->size(); }

}  // namespace petalite

// Null if the system gives no more threads.
PETALITE_API petalite::Team* petalite_team_new(int32_t n_threads) {
    try {
        return new petalite::Team(n_threads < 1 ? 1 : n_threads);
    } catch (...) {
        return nullptr;
    }
}

PETALITE_API void petalite_team_free(petalite::Team* team) { delete team; }
