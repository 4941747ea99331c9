// y = x · Wᵀ + b for up to MOST rows of x, W in float32 or in Q8_0: on a CPU such a product is as slow as reading W, and
// libraries for large matrices read at half the memory's speed. Compiled by `few_rows.py` when first needed.
//
// And attention of one query, by the same threads: a head is a chunk.
//
// The sum of an output has one order, whatever the number of rows and threads: a row's bits depend on the row alone.
//
// Threads claim chunks of W one by one, so none waits for a thread that the system has not scheduled: the caller
// computes what nobody has claimed. It waits only for chunks in work. Where that takes long, other processes have the
// cores, and for a while the caller computes alone: threads in lockstep run only when all of them are scheduled.

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MOST 8
#define GROUP 32             // weights that share a scale in Q8_0
#define CHUNK_BYTES (1 << 16)
#define SPINS 200            // between looks at the clock
#define AWAKE_NS 300000      // then a worker sleeps; a step's products are closer to each other
#define LONG_NS 1000000      // a wait: a chunk takes a hundredth of it
#define ALONE_NS 30000000    // after it: about a token of GPT-2

typedef float v16 __attribute__((vector_size(64)));
typedef float v16_at __attribute__((vector_size(64), aligned(4), may_alias));
#define WIDEST 16            // v16 of the largest head
#define BLOCK 64             // positions whose scores are known at once
typedef struct {
    const float *x, *bias;
    const void *weight;
    const _Float16 *scales;  // NULL: float32 weights
    float *y;
    long rows, n_in, n_out, chunk, chunks, workers;
    const float *k, *v;      // NULL: a product
    long stride, sharing;    // between heads of k and v, and query heads of one of them
    float scale;
} Job;

static inline v16 load(const float *at) { return *(const v16_at *)at; }
static inline v16 load_int8(const int8_t *at) {  // GCC 12 takes __builtin_convertvector apart
#if defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(__AVX2__)
    __m128i b = _mm_loadu_si128((const __m128i *)at);
    __m256 halves[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
    v16 found;
    memcpy(&found, halves, sizeof found);
    return found;
#else
    v16 found;
    for (int i = 0; i < 16; i++) found[i] = at[i];
    return found;
#endif
}

static inline float sum(v16 a) {
#define TURNED(by) __builtin_shufflevector(a, a, by, by + 1, by + 2, by + 3, by + 4, by + 5, by + 6, by + 7, by + 8, \
    by + 9, by + 10, by + 11, by + 12, by + 13, by + 14, by + 15)
    a += TURNED(8);
    a += TURNED(4);
    a += TURNED(2);
    a += TURNED(1);
    return a[0];
}

static inline __attribute__((always_inline)) void outputs(const Job *job, const int rows, long o) {
    const long n = job->n_in, whole = n - n % 32;
    v16 a[MOST] = {0}, b[MOST] = {0};
    float tail[MOST] = {0};
    if (job->scales) {
        const int8_t *w = (const int8_t *)job->weight + o * n;
        const _Float16 *scales = job->scales + o * (n / GROUP);
        for (long i = 0; i < n; i += GROUP) {
            v16 w0 = load_int8(w + i), w1 = load_int8(w + i + 16);
            float scale = (float)scales[i / GROUP];
            for (int r = 0; r < rows; r++) {
                const float *x = job->x + r * n + i;
                v16 part = w0 * load(x) + w1 * load(x + 16);
                if (i / GROUP % 2) b[r] += part * scale;
                else a[r] += part * scale;
            }
        }
    } else {
        const float *w = (const float *)job->weight + o * n;
        for (long i = 0; i < whole; i += 32) {
            v16 w0 = load(w + i), w1 = load(w + i + 16);
            for (int r = 0; r < rows; r++) {
                const float *x = job->x + r * n + i;
                a[r] += w0 * load(x);
                b[r] += w1 * load(x + 16);
            }
        }
        for (long i = whole; i < n; i++)
            for (int r = 0; r < rows; r++) tail[r] += w[i] * job->x[r * n + i];
    }
    for (int r = 0; r < rows; r++)
        job->y[r * job->n_out + o] = sum(a[r] + b[r]) + tail[r] + (job->bias ? job->bias[o] : 0);
}

// e^x for x ≤ 0, to the last bit or two: 2^n · p(r), |r| ≤ ln 2 / 2 (Cephes' expf).
static inline v16 exponential(v16 x) {
    typedef int32_t i16 __attribute__((vector_size(64)));
    const v16 lowest = (v16){0} - 87.0f;
    i16 low = x < lowest;
    x = (v16)(((i16)x & ~low) | ((i16)lowest & low));
    v16 n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // to the nearest whole number
    v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (v16)((__builtin_convertvector(n, i16) + 127) << 23);
}

// One query of a head to `rows` positions, BLOCK by BLOCK (Milakov & Gimelshein 2018).
static inline __attribute__((always_inline)) void attend(const Job *job, const long parts, long head) {
    const long S = job->rows, D = 16 * parts, at = head / job->sharing * job->stride;
    const float *k = job->k + at, *v = job->v + at;
    float top = -1e30f, total = 0, scores[BLOCK] __attribute__((aligned(64)));
    v16 q[WIDEST], y[WIDEST] = {0};
    for (long p = 0; p < parts; p++) q[p] = load(job->x + head * D + 16 * p) * job->scale;
    for (long start = 0; start < S; start += BLOCK) {
        long n = S - start < BLOCK ? S - start : BLOCK;
        float highest = top;
        for (long i = 0; i < BLOCK; i++) scores[i] = -1e30f;
        for (long i = 0; i < n; i++) {
            const float *of = k + (start + i) * D;
            v16 a = q[0] * load(of);
            for (long p = 1; p < parts; p++) a += q[p] * load(of + 16 * p);
            scores[i] = sum(a);
            if (scores[i] > highest) highest = scores[i];
        }
        float shrink[16] __attribute__((aligned(64))) = {top - highest};
        *(v16 *)shrink = exponential(*(v16 *)shrink);
        v16 added = {0};
        for (long i = 0; i < BLOCK; i += 16) {
            v16 weights = exponential(load(scores + i) - highest);
            *(v16 *)(scores + i) = weights;
            added += weights;
        }
        for (long i = n; i < BLOCK; i++) added[i % 16] -= scores[i];  // e^-87 each, or 1 where all is as low
        for (long p = 0; p < parts; p++) y[p] *= shrink[0];
        total = total * shrink[0] + sum(added);
        top = highest;
        for (long i = 0; i < n; i++)
            for (long p = 0; p < parts; p++) y[p] += load(v + (start + i) * D + 16 * p) * scores[i];
    }
    for (long p = 0; p < parts; p++) *(v16_at *)(job->y + head * D + 16 * p) = y[p] / total;
}

static void compute(const Job *job, long chunk) {
    if (job->k) {
        if (job->n_in == 64) attend(job, 4, chunk);
        else if (job->n_in == 128) attend(job, 8, chunk);
        else attend(job, job->n_in / 16, chunk);
        return;
    }
    long end = (chunk + 1) * job->chunk;
    if (end > job->n_out) end = job->n_out;
#define CASE(R) \
    case R: \
        for (long o = chunk * job->chunk; o < end; o++) outputs(job, R, o); \
        break;
    switch (job->rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

static Job job;                       // of the threads together
static _Atomic uint64_t turn;         // a job's number << 32 | its next chunk
static _Atomic long done, sleeping;
static long started;                  // workers
static _Atomic long alone_until;      // nanoseconds
static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER, mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
#define CLOSED 0xFFFFFFFFu

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

// Claim a chunk and compute it; 0 where there is none. A claim succeeds only while the job read is the current one.
static int take(long worker) {
    uint64_t seen = atomic_load(&turn);
    Job mine = job;
    long next = (long)(seen & CLOSED);
    if (next == CLOSED || next >= mine.chunks || worker >= mine.workers) return 0;
    if (!atomic_compare_exchange_strong(&turn, &seen, seen + 1)) return 1;
    compute(&mine, next);
    atomic_fetch_add(&done, 1);
    return 1;
}

static void *work(void *number) {
    long worker = (long)number, last = nanoseconds(), spins = 0;
    uint64_t seen;
    for (;;) {
        if (take(worker)) {
            spins = last = 0;
        } else if (++spins % SPINS) {
            pause_cpu();
        } else {  // without sched_yield, after which Linux takes long to come back
            if (!last) last = nanoseconds();
            if (nanoseconds() - last < AWAKE_NS) continue;
            pthread_mutex_lock(&mutex);
            atomic_fetch_add(&sleeping, 1);
            seen = atomic_load(&turn) >> 32;
            while (atomic_load(&turn) >> 32 == seen) pthread_cond_wait(&wake, &mutex);
            atomic_fetch_sub(&sleeping, 1);
            pthread_mutex_unlock(&mutex);
            last = 0;
        }
    }
    return 0;
}

static void start_workers(long n) {
    for (pthread_t thread; started < n; started++) {
        if (pthread_create(&thread, 0, work, (void *)started)) return;
        pthread_detach(thread);
    }
}

static void run(Job mine, long threads) {
    if (mine.chunks < 2 || threads < 2 || nanoseconds() < atomic_load(&alone_until) ||
        pthread_mutex_trylock(&caller)) {
        for (long i = 0; i < mine.chunks; i++) compute(&mine, i);
        return;
    }
    start_workers(mine.workers);
    uint64_t number = (atomic_load(&turn) >> 32) + 1;
    atomic_store(&turn, number << 32 | CLOSED);
    job = mine;
    atomic_store(&done, 0);
    atomic_store(&turn, number << 32);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&mutex);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&mutex);
    }
    while (take(-1)) {}
    long since = 0, waited = 0;
    for (long spins = 1; atomic_load(&done) < mine.chunks; spins++) {
        pause_cpu();
        if (spins % SPINS) continue;
        if (!since) since = nanoseconds();
        waited = nanoseconds() - since;
        if (waited > LONG_NS) sched_yield();
    }
    if (waited > LONG_NS) atomic_store(&alone_until, nanoseconds() + ALONE_NS);
    pthread_mutex_unlock(&caller);
}

// y (rows, n_out) of x (rows, n_in), rows ≤ MOST, by `threads` at most. Weights are (n_out, n_in) float32, or with
// `scales` (n_out, n_in / GROUP) int8, n_in a multiple of GROUP.
void few_rows(const float *x, const void *weight, const void *scales, const float *bias, float *y, long rows, long n_in,
              long n_out, long threads) {
    long bytes = n_in * (scales ? 1 : 4), chunk = (CHUNK_BYTES + bytes - 1) / bytes, chunks = (n_out + chunk - 1) / chunk;
    run((Job){x, bias, weight, scales, y, rows, n_in, n_out, chunk, chunks, threads - 1}, threads);
}

// y (heads, size) of one query (heads, size), size a multiple of 16 up to 16 · WIDEST, and `seen` positions of k and v,
// `stride` numbers from one of their heads to the next, each for `sharing` query heads.
void attend_one(const float *q, const float *k, const float *v, float *y, long heads, long sharing, long size, long seen,
                long stride, float scale, long threads) {
    run((Job){q, 0, 0, 0, y, seen, size, heads, 1, heads, threads - 1, k, v, stride, sharing, scale}, threads);
}
