// The emulator's runtime: fibers, schedules, memory checks, warp collectives, barriers, launches; see README.md.
// Compile WITHOUT -fsanitize=...; it links into a plain, an ASan or a TSan build and adapts to what it finds there.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

#include "simt.h"
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK void* __asan_region_is_poisoned(void*, size_t);
WEAK void __asan_report_error(void*, void*, void*, void*, int, size_t);
WEAK void* __tsan_get_current_fiber(void);
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __tsan_read_range(void*, unsigned long);
WEAK void __tsan_write_range(void*, unsigned long);
}
namespace simt {
static const bool asan = __asan_poison_memory_region != nullptr;
static const bool tsan = __tsan_create_fiber != nullptr;
static constexpr size_t kStack = 256 << 10;
Ctx* cur = nullptr;
Config config;
Stats stats;
Interceptor interceptor;

static uint64_t rng_state;
static inline uint32_t rnd() {
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return uint32_t(rng_state >> 32);
}
static inline uint32_t rnd(uint32_t n) { return uint32_t((uint64_t(rnd()) * n) >> 32); }

// ---------------------------------------------------------------- context switch
#ifdef SIMT_UCONTEXT
struct Sp {
    ucontext_t u;
};
static void swap_ctx(Sp& from, Sp& to) { swapcontext(&from.u, &to.u); }
#else
extern "C" void simt_swap(void** from, void* to);
asm(R"(
.text
.globl simt_swap
.type simt_swap,@function
simt_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_swap,.-simt_swap
)");
struct Sp {
    void* sp = nullptr;
};
static void swap_ctx(Sp& from, Sp& to) { simt_swap(&from.sp, to.sp); }
#endif

struct Block;
struct Pending {
    unsigned char* dst;
    const unsigned char* src;
    short bytes, src_bytes;
    int group;
    bool done;
};
static constexpr int kMaxPending = 512;  // outstanding cp.async per thread; fixed array: no malloc inside fibers (TSan)
enum State { READY, AT_WARP, AT_BAR, DONE };
struct Fiber : Ctx {
    Block* blk;
    int lin, lane, warp;
    State st;
    Sp sp;
    char* stack;
    void* tsan_f;
    Op op;
    unsigned mask;
    WarpArgs* args;
    Loc loc;
    int bar_id;
    int bar_kind;
    Pending pend[kMaxPending];
    int npend, ngroups, nopen;
    unsigned take_no;
};
struct Bar {
    int arrived = 0, want = 0, sum = 0, last_sum = 0;
    unsigned gen = 0;
    Loc loc{};
    int kind = 0;
    char sync[2][8];
};
struct Block {
    uint3 id;
    int n, nw, ndone;
    std::vector<Fiber*> f;
    std::vector<uint32_t> ready, alive, prio;
    Bar bar[16];
    unsigned char* smem;
    size_t smem_bytes;
    char wsync[32][2][8];
    unsigned wgen[32];
    struct {
        unsigned mask, got;
        int nwait, line;
        Op op;
    } wc[32];  // wc: lanes now waiting
    std::pair<size_t, size_t> takes[64];
    unsigned ntakes = 0;  // every thread must carve identically
};
static auto& stack_pool = *new std::vector<char*>;
static auto& fiber_pool = *new std::vector<Fiber*>;  // never destroyed (LSan)
static Sp main_sp;
static void* main_tsan;
static const void* main_stack;
static size_t main_stack_sz;
static const std::function<void()>* body_fn;
static bool err;
static char err_msg[2048];
static char end_sync[8], fence_sync[8];
static std::vector<Block*> blocks;
static Fiber* me() { return static_cast<Fiber*>(cur); }

static void to_main(bool dying) {
    Fiber* f = me();
    void* fake = nullptr;
    if (asan) __sanitizer_start_switch_fiber(dying ? nullptr : &fake, main_stack, main_stack_sz);
    if (tsan) __tsan_switch_to_fiber(main_tsan, 1);
    swap_ctx(f->sp, main_sp);
    if (asan) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
static void entry() {
    if (asan) __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_sz);
    (*body_fn)();
    Fiber* f = me();
    if (f->npend)
        fail("thread exits with cp.async still in flight (missing cp_async_commit/cp_async_wait)", {"exit", 0});
    if (tsan) __tsan_release(end_sync);
    f->st = DONE;
    f->blk->ndone++;
    f->blk->alive[f->warp] &= ~(1u << f->lane);
    to_main(true);
    abort();
}
static void run_fiber(Fiber* f) {
    cur = f;
    stats.switches++;
    void* fake = nullptr;
    if (asan) __sanitizer_start_switch_fiber(&fake, f->stack, kStack);
    if (tsan) __tsan_switch_to_fiber(f->tsan_f, 1);
    swap_ctx(main_sp, f->sp);
    if (asan) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    cur = nullptr;
}
static std::string where(Fiber* f) {
    char b[256];
    snprintf(b, sizeof b, "block(%u,%u,%u) warp %d lane %d", f->bid.x, f->bid.y, f->bid.z, f->warp, f->lane);
    return b;
}
void fail(const std::string& msg, Loc loc) {
    if (!cur) throw std::runtime_error(msg);
    std::string m = "simt: " + msg + " [" + where(me()) + "] at " + loc.file + ":" + std::to_string(loc.line);
    if (!err) {
        err = true;
        snprintf(err_msg, sizeof err_msg, "%s", m.c_str());
    }
    m.clear();
    m.shrink_to_fit();
    const_cast<std::string&>(msg).clear();
    const_cast<std::string&>(msg).shrink_to_fit();  // this stack is abandoned
    to_main(true);
    abort();
}
static void wake(Fiber* f) {
    f->st = READY;
    f->blk->ready[f->warp] |= 1u << f->lane;
}
static void block_here(State s) {
    Fiber* f = me();
    f->st = s;
    to_main(false);
}
static bool yielded;  // the last fiber spins: the fixed schedules must let another one run
void yield() {
    yielded = true;
    wake(me());
    to_main(false);
}

// ---------------------------------------------------------------- memory checks
static void check_mem(const void* p, size_t n, bool write, size_t align, const char* what, Loc loc) {
    if (reinterpret_cast<uintptr_t>(p) % align) fail(std::string(what) + ": misaligned address", loc);
    if (asan && n)
        if (void* bad = __asan_region_is_poisoned(const_cast<void*>(p), n)) {
            fprintf(stderr, "simt: %s at %s:%d touches poisoned memory\n", what, loc.file, loc.line);
            void* sp = __builtin_frame_address(0);
            __asan_report_error(__builtin_return_address(0), sp, sp, bad, write, n);
        }
    if (tsan && n) (write ? __tsan_write_range : __tsan_read_range)(const_cast<void*>(p), n);
}
static void check_smem(const void* p, size_t n, const char* what, Loc loc) {
    Block* b = me()->blk;
    auto* c = static_cast<const unsigned char*>(p);
    if (c < b->smem || c + n > b->smem + b->smem_bytes)
        fail(std::string(what) + ": address is not in this block's dynamic shared memory", loc);
}
unsigned char* dyn_smem() { return me()->blk->smem; }
void* smem_take(unsigned char*& p, size_t bytes, Loc loc) {
    constexpr size_t rz = 64;  // red zone on CPU only
    Fiber* f = me();
    Block* b = f->blk;
    size_t off = p - b->smem, sz = (bytes + 15) / 16 * 16;
    size_t gpu_end = off + sz - f->take_no * rz;  // what the GPU carver would have used
    if (gpu_end > b->smem_bytes - 64 * rz)
        fail("dynamic shared memory overflow: carved " + std::to_string(gpu_end) + " of " +
                 std::to_string(b->smem_bytes - 64 * rz),
             loc);
    if (f->take_no >= b->ntakes) {
        if (b->ntakes == 64) fail("more than 64 shared arrays", loc);
        b->takes[b->ntakes++] = {off, bytes};
        if (asan) __asan_unpoison_memory_region(p, bytes);
    } else if (b->takes[f->take_no] != std::make_pair(off, bytes))
        fail("threads carve shared memory differently", loc);
    f->take_no++;
    void* r = p;
    p += sz + rz;
    return r;
}
void fence() {
    if (tsan) {
        __tsan_acquire(fence_sync);
        __tsan_release(fence_sync);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// ---------------------------------------------------------------- cp.async: completes at a random legal moment
static void complete(Pending& p) {
    memcpy(p.dst, p.src, p.src_bytes);
    memset(p.dst + p.src_bytes, 0, p.bytes - p.src_bytes);
    p.done = true;
}
static void land(Pending& p) {
    if (asan) __asan_unpoison_memory_region(p.dst, p.bytes);
    complete(p);
}
void cp_async(void* dst, const void* src, int bytes, int src_bytes, Loc loc) {
    stats.cp_async++;
    check_smem(dst, bytes, "cp.async dst", loc);
    check_mem(dst, bytes, true, bytes, "cp.async dst", loc);
    check_mem(src, src_bytes, false, bytes, "cp.async src", loc);
    Fiber* f = me();
    if (f->npend == kMaxPending) fail("too many cp.async in flight", loc);
    Pending& p = f->pend[f->npend++] = {
        (unsigned char*)dst, (const unsigned char*)src, (short)bytes, (short)src_bytes, f->ngroups, false};
    if (rnd(8) == 0)
        complete(p);
    else {
        memset(dst, 0xFF, bytes);
        if (asan) __asan_poison_memory_region(dst, bytes);
    }  // not visible yet: NaN, and ASan traps a read
}
void cp_commit() { me()->ngroups++; }
void cp_wait(int n) {
    Fiber* f = me();
    int keep = 0;
    for (int i = 0; i < f->npend; i++) {
        Pending& p = f->pend[i];
        if (p.group < f->ngroups - n) {
            if (tsan) {
                __tsan_write_range(p.dst, p.bytes);
                if (p.src_bytes) __tsan_read_range((void*)p.src, p.src_bytes);
            }
            if (!p.done) land(p);
        } else {
            if (!p.done && rnd(8) == 0) land(p);
            f->pend[keep++] = p;
        }
    }
    f->npend = keep;
}

// ---------------------------------------------------------------- warp collectives: last arriver executes for all
static float bf(uint32_t w, int hi) {
    uint32_t u = hi ? w & 0xffff0000u : w << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static void exec(Op op, unsigned mask, Fiber** L) {
    auto A = [&](int l) -> WarpArgs& { return *L[l]->args; };
    switch (op) {
        case SHFL_IDX:
        case SHFL_UP:
        case SHFL_DOWN:
        case SHFL_XOR: {
            uint64_t out[32];
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) {
                    int w = A(l).width, base = l & ~(w - 1), s;
                    if (op == SHFL_IDX)
                        s = base + (A(l).arg & (w - 1));
                    else if (op == SHFL_XOR)
                        s = l ^ A(l).arg;
                    else
                        s = op == SHFL_UP ? l - A(l).arg : l + A(l).arg;
                    if (op == SHFL_UP && s < base) s = l;
                    if (op != SHFL_UP && s >= base + w) s = l;
                    out[l] = (mask >> s & 1) ? A(s).v
                                             : 0xDEADBEEFDEADBEEFull;  // reading a lane outside the mask is undefined
                }
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) A(l).v = out[l];
            break;
        }
        case BALLOT: {
            uint32_t r = 0;
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) r |= uint32_t(A(l).v != 0) << l;
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) A(l).v = r;
            break;
        }
        case MATCH_ANY: {
            uint32_t r[32] = {};
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1)
                    for (int k = 0; k < 32; k++)
                        if (mask >> k & 1) r[l] |= uint32_t(A(k).v == A(l).v) << k;
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) A(l).v = r[l];
            break;
        }
        case RED_ADD:
        case RED_MIN:
        case RED_MAX: {
            bool first = true;
            int64_t r = 0;
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) {
                    int64_t v = (int64_t)A(l).v;
                    r = first ? v : op == RED_ADD ? r + v : op == RED_MIN ? std::min(r, v) : std::max(r, v);
                    first = false;
                }
            for (int l = 0; l < 32; l++)
                if (mask >> l & 1) A(l).v = (uint64_t)r;
            break;
        }
        case SYNCWARP:
            break;
        case MMA16816: {  // PTX ISA fragment layout: group g = lane/4, t = lane%4
            stats.mma++;
            float a[16][16], b[16][8];
            for (int l = 0; l < 32; l++) {
                int g = l / 4, t = l % 4;
                auto& w = A(l);
                for (int i = 0; i < 4; i++)
                    for (int h = 0; h < 2; h++) a[g + (i & 1) * 8][t * 2 + h + (i >> 1) * 8] = bf(w.a[i], h);
                for (int i = 0; i < 2; i++)
                    for (int h = 0; h < 2; h++) b[t * 2 + h + i * 8][g] = bf(w.b[i], h);
            }
            for (int l = 0; l < 32; l++)
                for (int i = 0; i < 4; i++) {
                    int r = l / 4 + (i >> 1) * 8, c = (l % 4) * 2 + (i & 1);
                    double s = A(l).d[i];
                    for (int k = 0; k < 16; k++) s += double(a[r][k]) * b[k][c];
                    float o = (float)s;
                    if (config.mma_mode == 1 && std::isfinite(o) && std::fabs(o) > std::fabs(s))
                        o = std::nextafterf(o, 0.f);
                    A(l).d[i] = o;
                }
            break;
        }
        case MMA_S8_16832: {  // the same bytes as bf16's fragments: four int8 where two bf16 lie
            stats.mma++;
            int a[16][32], b[32][8];
            for (int l = 0; l < 32; l++) {
                int g = l / 4, t = l % 4;
                auto& w = A(l);
                for (int i = 0; i < 4; i++)
                    for (int h = 0; h < 4; h++) a[g + (i & 1) * 8][t * 4 + h + (i >> 1) * 16] = int8_t(w.a[i] >> 8 * h);
                for (int i = 0; i < 2; i++)
                    for (int h = 0; h < 4; h++) b[t * 4 + h + i * 16][g] = int8_t(w.b[i] >> 8 * h);
            }
            for (int l = 0; l < 32; l++)
                for (int i = 0; i < 4; i++) {
                    int r = l / 4 + (i >> 1) * 8, c = (l % 4) * 2 + (i & 1);
                    uint32_t s = uint32_t(A(l).di[i]);
                    for (int k = 0; k < 32; k++) s += uint32_t(a[r][k] * b[k][c]);
                    A(l).di[i] = int(s);
                }
            break;
        }
        case LDM4:
        case LDM4T: {
            stats.ldmatrix++;
            for (int m = 0; m < 4;
                 m++) {  // bank conflicts: 8 rows x 16 bytes are one 128-byte wavefront when conflict-free
                int cnt[32] = {}, mx = 0;
                for (int r = 0; r < 8; r++)
                    for (int q = 0; q < 4; q++) {
                        uintptr_t wd = ((uintptr_t)A(m * 8 + r).ptr - (uintptr_t)L[0]->blk->smem) / 4 + q;
                        bool dup = false;
                        for (int r2 = 0; r2 < r; r2++) dup |= A(m * 8 + r2).ptr == A(m * 8 + r).ptr;
                        if (!dup) mx = std::max(mx, ++cnt[wd % 32]);
                    }
                stats.bank_extra += mx - 1;
                uint16_t t[8][8];
                for (int r = 0; r < 8; r++) memcpy(t[r], A(m * 8 + r).ptr, 16);
                for (int l = 0; l < 32; l++) {
                    int r = l / 4, c = (l % 4) * 2;
                    A(l).r[m] =
                        op == LDM4 ? t[r][c] | uint32_t(t[r][c + 1]) << 16 : t[c][r] | uint32_t(t[c + 1][r]) << 16;
                }
            }
            break;
        }
    }
}
void warp_op(Op op, unsigned mask, WarpArgs& w, Loc loc) {
    Fiber* f = me();
    Block* b = f->blk;
    stats.collectives++;
    if (!(mask >> f->lane & 1)) fail("calling lane is not in the mask of a warp collective", loc);
    if (op == LDM4 || op == LDM4T) {
        check_smem(w.ptr, 16, "ldmatrix", loc);
        check_mem(w.ptr, 16, false, 16, "ldmatrix", loc);
    }
    f->op = op;
    f->mask = mask;
    f->args = &w;
    f->loc = loc;
    f->st = AT_WARP;
    Fiber** L = &b->f[f->warp * 32];
    int nl = std::min(32, b->n - f->warp * 32);
    unsigned got = 1u << f->lane;
    auto& wc = b->wc[f->warp];
    if (!wc.nwait) {
        wc.mask = mask;
        wc.op = op;
        wc.line = loc.line;
        wc.got = 0;
    }
    wc.nwait++;
    if (wc.mask == mask && wc.op == op && wc.line == loc.line && wc.nwait == __builtin_popcount(wc.got) + 1 &&
        (mask & ~b->alive[f->warp]) == 0)
        got = wc.got |= got;  // usual case
    else
        for (int l = 0; l < nl; l++)
            if (mask >> l & 1) {
                Fiber* o = L[l];
                if (o->st == DONE)
                    fail("warp collective waits for a lane that has exited (lane " + std::to_string(l) + ")", loc);
                if (o->st != AT_WARP) continue;
                if (o->mask == mask && (o->op != op || o->loc.line != loc.line))
                    fail("divergent warp collective: lane " + std::to_string(l) + " is at " + o->loc.file + ":" +
                             std::to_string(o->loc.line),
                         loc);
                if (o->mask == mask)
                    got |= 1u << l;
                else if (o->mask >> f->lane & 1)
                    fail("warp collectives with overlapping but different masks (lane " + std::to_string(l) +
                             " at line " + std::to_string(o->loc.line) + ")",
                         loc);
            }
    unsigned full = nl == 32 ? ~0u : (1u << nl) - 1;
    if (mask & ~full) fail("mask names lanes that do not exist (block size not a multiple of 32)", loc);
    bool sync = op == SYNCWARP;
    unsigned g = b->wgen[f->warp] & 1;  // only __syncwarp orders memory, shuffles/mma do not
    if (tsan && sync) __tsan_release(b->wsync[f->warp][g]);
    if (got == mask) {
        exec(op, mask, L);
        if (sync) b->wgen[f->warp]++;
        wc.nwait -= __builtin_popcount(mask);
        for (int l = 0; l < nl; l++)
            if ((mask >> l & 1)) wake(L[l]);
        to_main(false);
    } else
        block_here(AT_WARP);
    if (tsan && sync) __tsan_acquire(b->wsync[f->warp][g]);
}
// ---------------------------------------------------------------- block barriers
static void release_bar(Block* b, int id) {
    Bar& r = b->bar[id];
    r.last_sum = r.sum;
    r.sum = 0;
    r.arrived = 0;
    r.gen++;
    for (Fiber* o : b->f)
        if (o->st == AT_BAR && o->bar_id == id) wake(o);
}
void block_barrier(int id, int count, Loc loc, int kind, int pred, int* result) {
    Fiber* f = me();
    Block* b = f->blk;
    Bar& r = b->bar[id & 15];
    int want = count < 0 ? b->n : count;
    stats.barriers++;
    if (r.arrived && (r.loc.line != loc.line || r.kind != kind || r.want != want))
        fail("divergent barrier: other threads wait at " + std::string(r.loc.file) + ":" + std::to_string(r.loc.line),
             loc);
    if (count < 0 && config.strict_exit && b->ndone)
        fail("__syncthreads after some threads of the block have exited", loc);
    r.loc = loc;
    r.kind = kind;
    r.want = want;
    r.arrived++;
    r.sum += pred != 0;
    unsigned g = r.gen & 1;
    f->loc = loc;
    f->bar_id = id & 15;
    if (tsan) __tsan_release(r.sync[g]);
    f->st = AT_BAR;
    if (r.arrived == want) release_bar(b, id & 15);
    to_main(false);
    if (tsan) __tsan_acquire(r.sync[g]);
    if (result) *result = r.last_sum;
}

// ---------------------------------------------------------------- launch
static char* map(size_t n) {
    char* m = (char*)mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) throw std::runtime_error("simt: mmap failed");
    return m;
}
static char* get_stack() {  // TSan: fresh mapping per use, so that reuse by another fiber is not seen as a race
    if (!tsan && !stack_pool.empty()) {
        char* s = stack_pool.back();
        stack_pool.pop_back();
        return s;
    }
    char* m = map(kStack + 4096);
    mprotect(m, 4096, PROT_NONE);
    return m + 4096;
}
static Block* make_block(uint3 id, dim3 grid, dim3 bd, size_t smem) {
    Block* b = new Block();
    b->id = id;
    b->n = bd.x * bd.y * bd.z;
    b->nw = (b->n + 31) / 32;
    b->ready.assign(b->nw, 0);
    b->alive.assign(b->nw, 0);
    b->prio.resize(b->nw);
    for (auto& p : b->prio) p = rnd();
    b->smem_bytes = smem + 64 * 64;  // room for red zones
    b->smem = (unsigned char*)map(b->smem_bytes);
    memset(b->smem, 0xFF, b->smem_bytes);                           // NaN poison
    if (asan) __asan_poison_memory_region(b->smem, b->smem_bytes);  // SmemCarver::take opens exactly what it hands out
    for (int i = 0; i < b->n; i++) {
        Fiber* f;
        if (fiber_pool.empty())
            f = new Fiber();
        else {
            f = fiber_pool.back();
            fiber_pool.pop_back();
        }
        f->npend = f->ngroups = 0;
        f->take_no = 0;
        f->blk = b;
        f->lin = i;
        f->lane = i % 32;
        f->warp = i / 32;
        f->bid = id;
        f->bdim = bd;
        f->gdim = grid;
        f->tid = {i % bd.x, i / bd.x % bd.y, i / (bd.x * bd.y)};
        f->stack = get_stack();
        if (asan) __asan_unpoison_memory_region(f->stack, kStack);
        if (tsan) f->tsan_f = __tsan_create_fiber(0);
#ifdef SIMT_UCONTEXT
        getcontext(&f->sp.u);
        f->sp.u.uc_stack = {f->stack, 0, kStack};
        f->sp.u.uc_link = nullptr;
        makecontext(&f->sp.u, entry, 0);
#else
        void** sp = (void**)(f->stack + kStack - 56);
        *sp = nullptr; /* rsp % 16 == 8 at entry */
        *--sp = (void*)entry;
        sp -= 6;
        memset(sp, 0, 48);
        f->sp.sp = sp;
#endif
        b->f.push_back(f);
        b->alive[f->warp] |= 1u << f->lane;
        wake(f);
    }
    stats.blocks++;
    return b;
}
static void free_block(Block* b) {
    for (Fiber* f : b->f) {
        if (tsan) __tsan_destroy_fiber(f->tsan_f);
        if (tsan)
            munmap(f->stack - 4096, kStack + 4096);
        else
            stack_pool.push_back(f->stack);
        fiber_pool.push_back(f);
    }
    if (asan) __asan_unpoison_memory_region(b->smem, b->smem_bytes);
    munmap(b->smem, b->smem_bytes);
    delete b;
}
static Fiber* pick() {
    int sched = config.sched;
    static struct {
        Block* first;
        int second;
    } c[1024];
    int n = 0;
    for (Block* b : blocks)
        for (int w = 0; w < b->nw; w++)
            if (b->ready[w]) {
                c[n].first = b;
                c[n++].second = w;
            }
    if (!n) return nullptr;
    int k = 0;
    const bool spinning = yielded;
    if (spinning && sched != Config::RunAhead) sched = Config::Random;
    yielded = false;
    if (sched == Config::Random)
        k = rnd(n);
    else if (sched == Config::Reverse)
        k = n - 1;
    else if (sched == Config::RunAhead) {  // one warp runs as far ahead as it can
        for (int i = 1; i < n; i++)
            if (c[i].first->prio[c[i].second] > c[k].first->prio[c[k].second]) k = i;
        if (spinning || rnd(256) == 0) c[k].first->prio[c[k].second] = rnd();
    }
    Block* b = c[k].first;
    uint32_t m = b->ready[c[k].second];
    int lane;
    if (sched == Config::InOrder)
        lane = __builtin_ctz(m);
    else if (sched == Config::Reverse)
        lane = 31 - __builtin_clz(m);
    else {
        int j = rnd(__builtin_popcount(m));
        uint32_t t = m;
        while (j--) t &= t - 1;
        lane = __builtin_ctz(t);
    }
    b->ready[c[k].second] &= ~(1u << lane);
    return b->f[c[k].second * 32 + lane];
}
void launch(dim3 grid, dim3 bd, size_t smem, const std::function<void()>& body, bool cooperative) {
    if (const char* s = getenv("SIMT_SEED")) config.seed = strtoull(s, nullptr, 10);
    if (const char* s = getenv("SIMT_SCHED")) config.sched = (decltype(config.sched))atoi(s);
    if (const char* s = getenv("SIMT_RESIDENT")) config.resident = atoi(s);
    if (const char* s = getenv("SIMT_MMA")) config.mma_mode = atoi(s);
    if (cur) throw std::runtime_error("nested launch");
    int n = bd.x * bd.y * bd.z;
    if (n < 1 || n > 1024 || grid.y > 65535 || grid.z > 65535 || !grid.x || !grid.y || !grid.z)
        throw std::runtime_error("simt: invalid launch configuration");
    if (cooperative && uint64_t(grid.x) * grid.y * grid.z > 32)
        throw std::runtime_error("simt: a cooperative launch of more than 32 blocks");
    if (smem > 227 * 1024) throw std::runtime_error("simt: more than 227 KiB of dynamic shared memory");
    rng_state = config.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
    for (int i = 0; i < 4; i++) rnd();
    body_fn = &body;
    err = false;
    if (tsan) main_tsan = __tsan_get_current_fiber();
    uint64_t total = uint64_t(grid.x) * grid.y * grid.z, next = 0;
    std::vector<uint64_t> order(total);
    for (uint64_t i = 0; i < total; i++) order[i] = i;
    if (config.sched != Config::InOrder)
        for (uint64_t i = total; i > 1; i--) std::swap(order[i - 1], order[rnd((uint32_t)i)]);
    while (!err) {
        while ((int)blocks.size() < (cooperative ? 32 : std::min(config.resident, 32)) && next < total) {
            uint64_t i = order[next++];
            blocks.push_back(make_block(
                {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y))}, grid,
                bd, smem));
        }
        if (blocks.empty()) break;
        Fiber* f = pick();
        if (!f) {
            std::string m = "simt: deadlock; waiting threads:";
            int shown = 0;
            Loc last{"", -1};
            for (Block* b : blocks)
                for (Fiber* o : b->f)
                    if ((o->st == AT_BAR || o->st == AT_WARP) && shown < 6 && o->loc.line != last.line) {
                        m += std::string("\n  ") + (o->st == AT_BAR ? "barrier" : "warp collective") + " at " +
                             o->loc.file + ":" + std::to_string(o->loc.line) + " (" + where(o) + ", and others)";
                        shown++;
                        last = o->loc;
                    }
            err = true;
            snprintf(err_msg, sizeof err_msg, "%s", m.c_str());
            break;
        }
        run_fiber(f);
        if (f->st == DONE && f->blk->ndone == f->blk->n) {
            Block* b = f->blk;
            blocks.erase(std::find(blocks.begin(), blocks.end(), b));
            free_block(b);
        }
    }
    for (Block* b : blocks) free_block(b);
    blocks.clear();
    if (tsan) __tsan_acquire(end_sync);
    if (err) {
        err = false;
        throw std::runtime_error(err_msg);
    }
}
}  // namespace simt
