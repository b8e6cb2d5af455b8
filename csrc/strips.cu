// The strip form on the GPU, float32, contiguous maps, without atomics: the same bits every time. Formulas in swconv.h.
//
// A strip is worked on along its long side, across its short one; the horizontal one is turned when its input is put into
// shared memory, so that all strips run along the rows and neighbouring threads take neighbouring columns. A block of
// threads takes one channel of some images and a tile of the map, which is the whole map up to kTile px.
//
// Outputs and input gradient: a thread has kRun outputs along by two across. It slides over the input along the strip and
// keeps the taps that meet its kRun outputs in registers: at every step it reads N + 1 pixels and N new taps for
// 2 * kRun * N multiplications. Pixels outside the map are skipped. Kernels' gradients: a thread has kRun taps along by N
// across, and slides over two columns of the map, of all images of its block; blocks are added in a fixed order.
#include "device.h"
#include "swconv.h"

#include <algorithm>
#include <initializer_list>

namespace {

constexpr int kThreads = 128, kGradThreads = 256;
constexpr int kColumns = 2;   // outputs of a thread across the strip
constexpr int kRun = 7;       // outputs, or taps, of a thread along the strip; maps of 224 px networks are multiples of it
constexpr int kTile = 64;     // the longest side of a tile, px
constexpr int kBlocks = 1536; // of a launch, if there are images enough for them: some for every multiprocessor
constexpr int kSharedMost = 48 * 1024 / sizeof(float);  // what a block may take without asking, in floats
constexpr int kTilesMost = 96 * 1024 / sizeof(float);   // more, and tiles are made smaller

SWCONV_BOTH constexpr int up_to(int n, int by) { return (n + by - 1) / by * by; }
SWCONV_DEVICE int least(int a, int b) { return a < b ? a : b; }
SWCONV_DEVICE int most(int a, int b) { return a > b ? a : b; }

// i / by for i < 2^32 / by.
struct Divisor {
  unsigned by, magic;
  static Divisor of(int by) { return {static_cast<unsigned>(by), static_cast<unsigned>(((1ull << 32) + by - 1) / by)}; }
  SWCONV_DEVICE int quotient(int i) const {
    return by == 1 ? i : static_cast<int>(static_cast<unsigned long long>(static_cast<unsigned>(i)) * magic >> 32);
  }
};

// Numbers in a row, `width` at once: they start at a multiple of it.
template <int width>
struct alignas(width * sizeof(float)) Vector {
  float at[width];
};
template <int width, int count>
SWCONV_DEVICE void read(const float* from, float (&to)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += width) {
    const auto some = *reinterpret_cast<const Vector<width>*>(from + i);
#pragma unroll
    for (int j = 0; j < width; ++j) to[i + j] = some.at[j];
  }
}
template <int width, int count>
SWCONV_DEVICE void write(float* to, const float (&from)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += width) {
    Vector<width> some;
#pragma unroll
    for (int j = 0; j < width; ++j) some.at[j] = from[i + j];
    *reinterpret_cast<Vector<width>*>(to + i) = some;
  }
}

struct Strip {
  int length, breadth, anchor, tall;  // tall: along the rows of the map
  const float* kernel;                // tap t of column a of channel r: tap_of(t, a) of the r-th length * breadth
  SWCONV_DEVICE int tap_of(int t, int a) const { return tall ? t * breadth + a : a * length + t; }
};

struct Sizes {
  int images, channels, height, width, tile_height, tile_width, tiles_across, tiles, slots;  // slots: images of a block
  int together;                 // of a map that is one tile: pixels of a row to read and write at once, 1, 2 or 4
  Divisor row, map;             // of the whole map
};

// Part of a map in shared memory, for a strip: row `lead` is the first that is needed and on the map, those around are 0;
// pixel (along, across) of slot s at s * size + along * pitch + across. Pitches are 2 more than a multiple of 4: pairs of
// columns are read at once, and turned maps are written with few conflicts.
struct Region {
  int lead, pitch, size, margin;   // margin: columns before the tile's first
  int before, after;               // of the tile, how far along the strip reaches
  int tall;
  Divisor quick, slot;             // of the coordinate that runs with the threads, and of a slot's pixels
};

// A tile of the map for one channel and some images, and its place along and across a strip.
struct Block {
  const Sizes& s;
  int channel, image, top, left, high, wide;  // the first image; the tile, cut at the map's border

  SWCONV_DEVICE Block(const Sizes& s, int tile, int channel, int image) : s(s), channel(channel), image(image) {
    top = tile / s.tiles_across * s.tile_height, left = tile % s.tiles_across * s.tile_width;
    high = least(s.tile_height, s.height - top), wide = least(s.tile_width, s.width - left);
  }
  SWCONV_DEVICE int start(int tall) const { return tall ? top : left; }        // along
  SWCONV_DEVICE int along(int tall) const { return tall ? high : wide; }
  SWCONV_DEVICE int across(int tall) const { return tall ? wide : high; }
  SWCONV_DEVICE int first(const Region& r) const { return most(0, start(r.tall) - r.before); }
  SWCONV_DEVICE int last(const Region& r) const {                              // past the last that is needed
    return least(r.tall ? s.height : s.width, start(r.tall) + along(r.tall) + r.after);
  }
  SWCONV_DEVICE long long place(int slot) const {
    return (static_cast<long long>(image + slot) * s.channels + channel) * s.height * s.width;
  }

  // The whole map into a region of zeros and, turned, into another; `together` pixels of a row at a time, `ahead` such reads
  // at once.
  template <int together, int ahead>
  SWCONV_DEVICE void copy_map(const float* in, const Region& r, float* region, const Region* turned, float* to_turned,
                              int threads, int thread) const {
    const int down = r.tall ? r.pitch : 1, right = r.tall ? 1 : r.pitch;
    const int pixels = s.height * s.width, count = least(s.slots, s.images - image) * pixels;
#pragma unroll ahead
    for (int i = thread * together; i < count; i += threads * together) {
      const int slot = s.map.quotient(i), pixel = i - slot * pixels, y = s.row.quotient(pixel), x = pixel - y * s.width;
      float seen[together];
      read<together>(in + place(slot) + pixel, seen);
      float* to = region + slot * r.size + r.lead * r.pitch + r.margin + y * down + x * right;
#pragma unroll
      for (int j = 0; j < together; ++j) to[j * right] = seen[j];
      if (!turned) continue;
      to = to_turned + slot * turned->size + turned->lead * turned->pitch + turned->margin + y + x * turned->pitch;
#pragma unroll
      for (int j = 0; j < together; ++j) to[j * turned->pitch] = seen[j];
    }
  }

  // A tile of a larger map, with what is around it, or, with `only`, with 0 around it across the strip; of a whole map the
  // inside, in a region of zeros, and, where it is wanted, the same in another region, turned.
  template <int ahead>
  SWCONV_DEVICE void load(const float* in, bool only, const Region& r, float* region, const Region* turned, float* to_turned,
                          int threads, int thread) const {
    if (s.tiles == 1) {
      if (s.together == 4) return copy_map<4, ahead>(in, r, region, turned, to_turned, threads, thread);
      if (s.together == 2) return copy_map<2, ahead>(in, r, region, turned, to_turned, threads, thread);
      return copy_map<1, ahead>(in, r, region, turned, to_turned, threads, thread);
    }
    const int begin = first(r), end = last(r), from = (r.tall ? left : top) - r.margin;
    const int low = only ? from : 0, limit = only ? from + across(r.tall) : r.tall ? s.width : s.height;
#pragma unroll ahead
    for (int i = thread; i < s.slots * r.size; i += threads) {
      const int slot = r.slot.quotient(i), rest = i - slot * r.size, slow = r.quick.quotient(rest);
      const int quick = rest - slow * static_cast<int>(r.quick.by);
      const int row = r.tall ? slow : quick, column = r.tall ? quick : slow;
      const int at = begin - r.lead + row, line = from + column;
      const bool inside = image + slot < s.images && at >= begin && at < end && line >= low && line < limit;
      const int pixel = r.tall ? at * s.width + line : line * s.width + at;
      region[slot * r.size + row * r.pitch + column] = inside ? in[place(slot) + pixel] : 0.f;
    }
    if (turned) load<1>(in, only, *turned, to_turned, nullptr, nullptr, threads, thread);
  }
};

SWCONV_DEVICE void clear(float* floats, int even_count, int threads, int thread) {
  const float zeros[2] = {};
  for (int i = 2 * thread; i < even_count; i += 2 * threads) write<2>(floats + i, zeros);
}

// ---- outputs

struct Pass {
  Strip strip;
  Region region;
  const float* in;
  int taps, place;    // of its taps and its regions in shared memory
  float* out;
};

// The vertical strip and the small kernel run side by side, after the horizontal one.
struct Filters {
  Sizes s;
  Pass h, v, c;
  int adjoint, joint;  // joint: one result, in v.out
  int folded;          // the small kernel is added to the taps of the vertical strip
  int rounds;          // images of a block, in slots
  int clear, sum, sum_pitch;  // floats of regions, from h's on, that begin as zeros; place of the sums of h
  const float* bias;
  Divisor tile_row, tile;
};

// Taps of a pass with zeros around: column a of tap t at taps[(kRun + t) * tap_pitch + a].
SWCONV_BOTH constexpr int tap_pitch_of(int breadth) { return (breadth + 3) / 4 * 4; }

SWCONV_DEVICE void load_taps(const Filters& f, const Strip& k, const Strip* small, int channel, float* taps, int thread) {
  const int pitch = tap_pitch_of(k.breadth);
  const float* kernel = k.kernel + static_cast<long long>(channel) * k.length * k.breadth;
  for (int i = thread; i < (k.length + 3 * kRun) * pitch; i += kThreads) {
    int t = i / pitch - kRun, a = i % pitch;
    float tap = 0.f;
    if (t >= 0 && t < k.length && a < k.breadth) {
      if (f.adjoint) t = k.length - 1 - t, a = k.breadth - 1 - a;
      tap = kernel[k.tap_of(t, a)];
      if (small) {
        const int side = small->length, row = t - k.anchor + side / 2, column = a - k.breadth / 2 + side / 2;
        if (row >= 0 && row < side && column >= 0 && column < side)
          tap += small->kernel[(static_cast<long long>(channel) * side + row) * side + column];
      }
    }
    taps[i] = tap;
  }
}

// total += the run's outputs, from N columns of taps. `taps` and `pixels` of the first step.
template <int N>
SWCONV_DEVICE void slide(const float* taps, int tap_pitch, const float* pixels, int pitch, int steps,
                         float (&total)[kColumns][kRun]) {
  constexpr int width = N > 1 ? 2 : 1, tap_width = N > 1 ? 4 : 1;  // numbers that are read at once
  float window[N][kRun], seen[up_to(N + kColumns - 1, width)], fresh[up_to(N, tap_width)];
#pragma unroll
  for (int j = 1; j < kRun; ++j)
#pragma unroll
    for (int a = 0; a < N; ++a) window[a][kRun - j] = taps[a - j * tap_pitch];
  for (int step = 0; step < steps; step += kRun) {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      read<width>(pixels + (step + u) * pitch, seen);
      read<tap_width>(taps + (step + u) * tap_pitch, fresh);
#pragma unroll
      for (int a = 0; a < N; ++a) window[a][u] = fresh[a];
#pragma unroll
      for (int a = 0; a < N; ++a)
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int q = 0; q < kColumns; ++q) total[q][j] += window[a][(u - j + kRun) % kRun] * seen[a + q];
    }
  }
}

// total += outputs of one run.
template <int N>
SWCONV_DEVICE void run_of(const Filters& f, const Pass& p, const Block& block, const float* shared, int slot, int run,
                          int column, float (&total)[kColumns][kRun]) {
  const Strip& k = p.strip;
  const Region& r = p.region;
  const int anchor = f.adjoint ? k.length - 1 - k.anchor : k.anchor, tap_pitch = tap_pitch_of(k.breadth);
  const int first = block.first(r), out = block.start(k.tall) + run;           // of the run's first pixel, along
  const int begin = most(first, out - anchor), end = least(block.last(r), out + kRun - 1 + k.length - anchor);
  const float* tap = shared + p.taps + (kRun + begin - out + anchor) * tap_pitch;
  const float* pixels = shared + p.place + slot * r.size + (begin - first + r.lead) * r.pitch + column;
  if (k.breadth == N) slide<N>(tap, tap_pitch, pixels, r.pitch, end - begin, total);
  else
    for (int a = 0; a < k.breadth; ++a) slide<1>(tap + a, tap_pitch, pixels + a, r.pitch, end - begin, total);
}

template <int N>
SWCONV_DEVICE void filter_across(const Filters& f, const Block& block, float* shared, int thread) {
  const int runs = (block.wide + kRun - 1) / kRun, groups = (block.high + kColumns - 1) / kColumns;
  for (int item = thread; item < f.s.slots * runs * groups; item += kThreads) {
    const int slot = item / (runs * groups), run = item / groups % runs * kRun, row = item % groups * kColumns;
    if (block.image + slot >= f.s.images) continue;
    float total[kColumns][kRun] = {};
    run_of<N>(f, f.h, block, shared, slot, run, row, total);
    float* to = shared + f.sum + (slot * f.s.tile_height + row) * f.sum_pitch + run;
    const int wide = least(kRun, block.wide - run), high = least(kColumns, block.high - row);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
        if (j < wide && q < high) to[q * f.sum_pitch + j] = total[q][j];
  }
}

template <int N>
SWCONV_DEVICE void filter_down(const Filters& f, const Block& block, float* shared, int thread) {
  const Sizes& s = f.s;
  const int runs = (block.high + kRun - 1) / kRun, groups = (block.wide + kColumns - 1) / kColumns;
  const float bias = f.bias ? f.bias[block.channel] : 0.f;
  for (int item = thread; item < s.slots * runs * groups; item += kThreads) {
    const int slot = item / (runs * groups), run = item / groups % runs * kRun, column = item % groups * kColumns;
    if (block.image + slot >= s.images) continue;
    const int high = least(kRun, block.high - run), wide = least(kColumns, block.wide - column);
    const long long place = block.place(slot) + (block.top + run) * s.width + block.left + column;
    const float* sum = shared + f.sum + (slot * s.tile_height + run) * f.sum_pitch + column;
    const auto store = [&](float* out, const float(&total)[kColumns][kRun], bool joint) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j >= high) break;
        float row[kColumns];
#pragma unroll
        for (int q = 0; q < kColumns; ++q) row[q] = total[q][j] + (joint && q < wide ? sum[j * f.sum_pitch + q] + bias : 0.f);
        if (s.together >= kColumns) write<kColumns>(out + place + j * s.width, row);
        else
#pragma unroll
          for (int q = 0; q < kColumns; ++q)
            if (q < wide) out[place + j * s.width + q] = row[q];
      }
    };
    float total[kColumns][kRun] = {};
    run_of<N>(f, f.v, block, shared, slot, run, column, total);
    if (f.joint && !f.folded) run_of<N>(f, f.c, block, shared, slot, run, column, total);
    store(f.v.out, total, f.joint);
    if (f.joint) continue;
#pragma unroll
    for (int q = 0; q < kColumns; ++q)
#pragma unroll
      for (int j = 0; j < kRun; ++j) total[q][j] = 0.f;
    run_of<N>(f, f.c, block, shared, slot, run, column, total);
    store(f.c.out, total, false);
  }
}

SWCONV_DEVICE void store_sum(const Filters& f, const Block& block, const float* sum, float* out, int thread) {
  const Sizes& s = f.s;
  for (int i = thread; i < s.slots * static_cast<int>(f.tile.by); i += kThreads) {
    const int slot = f.tile.quotient(i), rest = i - slot * static_cast<int>(f.tile.by), y = f.tile_row.quotient(rest);
    const int x = rest - y * s.tile_width;
    if (block.image + slot < s.images && y < block.high && x < block.wide)
      out[block.place(slot) + (block.top + y) * s.width + block.left + x] =
          sum[(slot * s.tile_height + y) * f.sum_pitch + x];
  }
}

template <int N>
SWCONV_DEVICE void filters_block(const Filters& f, int block_x, int block_y, float* shared) {
  const Sizes& s = f.s;
  const int tile = block_x % s.tiles, channel = block_x / s.tiles;
  const bool once = f.h.in == f.v.in;                                  // one map, for both strips
  SWCONV_THREADS(kThreads, {
    load_taps(f, f.h.strip, nullptr, channel, shared + f.h.taps, thread);
    load_taps(f, f.v.strip, f.folded ? &f.c.strip : nullptr, channel, shared + f.v.taps, thread);
    if (!f.folded) load_taps(f, f.c.strip, nullptr, channel, shared + f.c.taps, thread);
    clear(shared + f.h.place, f.clear, kThreads, thread);
  });
  for (int round = 0; round < f.rounds; ++round) {
    const Block block(s, tile, channel, (block_y * f.rounds + round) * s.slots);
    if (block.image >= s.images) break;
    SWCONV_THREADS(kThreads, {
      block.load<4>(f.v.in, false, f.v.region, shared + f.v.place, once ? &f.h.region : nullptr, shared + f.h.place, kThreads,
                    thread);
      if (!once) block.load<4>(f.h.in, false, f.h.region, shared + f.h.place, nullptr, nullptr, kThreads, thread);
      if (!f.folded && f.c.place != f.v.place)
        block.load<4>(f.c.in, false, f.c.region, shared + f.c.place, nullptr, nullptr, kThreads, thread);
    });
    SWCONV_THREADS(kThreads, filter_across<N>(f, block, shared, thread));
    SWCONV_THREADS(kThreads, {
      if (!f.joint) store_sum(f, block, shared + f.sum, f.h.out, thread);
      filter_down<N>(f, block, shared, thread);
    });
  }
}

// ---- gradients of the kernels

struct Correlation {
  Strip strip;
  Region region, grad_region;
  const float* grad;
  int offset, runs, pairs;      // offset: of its taps among all, in `partial`
  int skip, reach;              // taps that meet no pixel of the map, whose gradients are 0, and how many after them do
  int rider_runs, rider_offset;  // 1 where the small kernel, as broad as this strip, is one more run of taps; its offset
};

struct Correlations {
  Sizes s;
  Correlation parts[3];
  const float *x, *rider_grad;
  Strip rider;
  int count, region, grad, all_taps, chunk;  // room for the regions of x, and of one gradient; images of a block
  int folded;                                // the small kernel's gradient is a part of the vertical strip's
  float* partial;
};

template <int N>
struct Taps {
  float total[N][kRun];
};

template <int N>
SWCONV_DEVICE void correlate(const Correlations& c, const Correlation& p, const Block& block, const float* region,
                             const float* grad, int column, int item, Taps<N>& taps) {
  const Strip& k = p.strip;
  const Region &r = p.region, &g = p.grad_region;
  const int pair = item % p.pairs * 2, run = item / p.pairs % (p.runs + p.rider_runs);
  const int slot = item / p.pairs / (p.runs + p.rider_runs);
  if (slot >= c.s.slots || block.image + slot >= c.s.images || pair >= block.across(k.tall)) return;
  const bool rides = run == p.runs;
  const int first = block.first(r), start = block.start(k.tall);
  const int shift = rides ? start - c.rider.anchor : start + p.skip + run * kRun - k.anchor;  // output p meets input p + shift
  const int begin = most(0, first - shift - (kRun - 1)), end = least(block.along(k.tall), block.last(r) - shift);
  if (begin >= end) return;
  const float* pixels = region + slot * r.size + (begin + shift - first + r.lead) * r.pitch + pair + column;
  const float* upstream = grad + (rides ? c.grad : 0) + slot * g.size + begin * g.pitch + pair;
  constexpr int width = N > 1 ? 2 : 1;
  float window[N + 1][kRun], seen[N + 1], wanted[2];
#pragma unroll
  for (int j = 0; j < kRun - 1; ++j) {
    read<width>(pixels + j * r.pitch, seen);
#pragma unroll
    for (int a = 0; a <= N; ++a) window[a][j] = seen[a];
  }
  for (int step = 0; step < end - begin; step += kRun) {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      read<width>(pixels + (step + u + kRun - 1) * r.pitch, seen);
      read<2>(upstream + (step + u) * g.pitch, wanted);
#pragma unroll
      for (int a = 0; a <= N; ++a) window[a][(u + kRun - 1) % kRun] = seen[a];
#pragma unroll
      for (int a = 0; a < N; ++a)
#pragma unroll
        for (int j = 0; j < kRun; ++j)
#pragma unroll
          for (int q = 0; q < 2; ++q) taps.total[a][j] += wanted[q] * window[a + q][(u + j) % kRun];
    }
  }
}

// Add what the threads have of tap t of a run, in their order. Thread i's of column a: sums[(i * N + a) * kRun + t].
template <int N>
SWCONV_DEVICE float collected(const Correlations& c, const Correlation& p, const float* sums, int run, int a, int t) {
  float total = 0.f;
  for (int slot = 0; slot < c.s.slots; ++slot)
    for (int pair = 0; pair < p.pairs; ++pair)
      total += sums[(((slot * (p.runs + p.rider_runs) + run) * p.pairs + pair) * N + a) * kRun + t];
  return total;
}

template <int N>
SWCONV_DEVICE void correlations_part(const Correlations& c, const Correlation& p, int block_x, int block_y, int column,
                                     float* shared) {
  const Sizes& s = c.s;
  const Strip &k = p.strip, &small = c.rider;
  float *region = shared, *grad = region + c.region;
  float* to = c.partial + (static_cast<long long>(block_y) * s.channels + block_x) * c.all_taps;
  const int items = s.slots * (p.runs + p.rider_runs) * p.pairs;
#ifdef SWCONV_EMULATE
  std::vector<Taps<N>> own(kGradThreads);
#define SWCONV_OWN own[thread]
#else
  Taps<N> own = {};
#define SWCONV_OWN own
#endif
  if (s.tiles == 1) SWCONV_THREADS(kGradThreads, clear(shared, c.region + 2 * c.grad, kGradThreads, thread));
  for (int image = block_y * c.chunk; image < least(s.images, (block_y + 1) * c.chunk); image += s.slots)
    for (int tile = 0; tile < s.tiles; ++tile) {
      const Block block(s, tile, block_x, image);
      SWCONV_THREADS(kGradThreads, {
        block.load<1>(c.x, false, p.region, region, nullptr, nullptr, kGradThreads, thread);
        block.load<1>(p.grad, true, p.grad_region, grad, nullptr, nullptr, kGradThreads, thread);
        if (p.rider_runs)
          block.load<1>(c.rider_grad, true, p.grad_region, grad + c.grad, nullptr, nullptr, kGradThreads, thread);
      });
      SWCONV_THREADS(kGradThreads, if (thread < items)
                     correlate<N>(c, p, block, region, grad, column, thread, SWCONV_OWN));
    }
  float* sums = shared;
  SWCONV_THREADS(kGradThreads, for (int a = 0; a < N; ++a) for (int j = 0; j < kRun; ++j)
                 sums[(thread * N + a) * kRun + j] = SWCONV_OWN.total[a][j]);
  const int side = small.length;
  SWCONV_THREADS(kGradThreads, {
    for (int i = thread; i < k.length * N; i += kGradThreads) {
      const int t = i / N, a = i % N, met = t - p.skip;
      const float total = met >= 0 && met < p.reach ? collected<N>(c, p, sums, met / kRun, a, met % kRun) : 0.f;
      to[p.offset + k.tap_of(t, column + a)] = total;
      const int row = t - k.anchor + side / 2, from_left = column + a - k.breadth / 2 + side / 2;
      if (c.folded && k.tall && row >= 0 && row < side && from_left >= 0 && from_left < side)
        to[p.rider_offset + row * side + from_left] = total;
    }
    for (int i = thread; i < p.rider_runs * side * N; i += kGradThreads)
      to[p.rider_offset + i / N * side + column + i % N] = collected<N>(c, p, sums, p.runs, i % N, i / N);
  });
}

template <int N>
SWCONV_DEVICE void correlations_block(const Correlations& c, int block_x, int block_y, float* shared) {
  for (int part = 0; part < c.count; ++part) {
    const Correlation& p = c.parts[part];
    if (p.strip.breadth == N) correlations_part<N>(c, p, block_x, block_y, 0, shared);
    else
      for (int a = 0; a < p.strip.breadth; ++a) correlations_part<1>(c, p, block_x, block_y, a, shared);
  }
}

// partial (chunks, channels, taps): add the chunks, in their order.
struct PartialSum {
  int chunks, channels, of_h, of_v, of_c;
  const float* partial;
  float *to_h, *to_v, *to_c;

  SWCONV_DEVICE void add(long long i) const {
    const int taps = of_h + of_v + of_c, r = static_cast<int>(i / taps), t = static_cast<int>(i % taps);
    float total = 0.f;
    for (int chunk = 0; chunk < chunks; ++chunk)
      total += partial[(static_cast<long long>(chunk) * channels + r) * taps + t];
    float* to = t < of_h ? to_h + static_cast<long long>(r) * of_h + t
                : t < of_h + of_v ? to_v + static_cast<long long>(r) * of_v + t - of_h
                                  : to_c + static_cast<long long>(r) * of_c + t - of_h - of_v;
    *to = total;
  }
};

// ---- kernels: one for each breadth N that is made for; other strips go column by column

#ifdef SWCONV_EMULATE
#define SWCONV_KERNELS(N)                                                                          \
  void strip_filters_##N(int x, int y, float* shared, const Filters& f) { filters_block<N>(f, x, y, shared); } \
  void strip_correlations_##N(int x, int y, float* shared, const Correlations& c) { correlations_block<N>(c, x, y, shared); }
#else
#define SWCONV_KERNELS(N)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, N == 7 ? 3 : N < 5 ? 6 : 4) strip_filters_##N(const __grid_constant__ Filters f) {   \
    extern __shared__ __align__(16) float shared[];                                                                  \
    filters_block<N>(f, blockIdx.x, blockIdx.y, shared);                                                             \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(kGradThreads, N < 5 ? 3 : 1) strip_correlations_##N(                      \
      const __grid_constant__ Correlations c) {                                                                      \
    extern __shared__ __align__(16) float shared[];                                                                  \
    correlations_block<N>(c, blockIdx.x, blockIdx.y, shared);                                                        \
  }
extern "C" __global__ void __launch_bounds__(kThreads) strip_partial_sum(const PartialSum p, long long count) {
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) p.add(i);
}
#endif
SWCONV_KERNELS(1)
SWCONV_KERNELS(3)
SWCONV_KERNELS(5)
SWCONV_KERNELS(7)

}  // namespace

namespace swconv {
namespace {

#ifdef SWCONV_EMULATE
const char* add_partial(const PartialSum& p, int64_t count, void*) {
  for (int64_t i = 0; i < count; ++i) p.add(i);
  return nullptr;
}
#else
const char* add_partial(const PartialSum& p, int64_t count, void* stream) {
  strip_partial_sum<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(p, count);
  return message(cudaGetLastError());
}
#endif

#define SWCONV_LAUNCH(kind, breadth, ...)                                  \
  ((breadth) == 3   ? launch(strip_##kind##_3, __VA_ARGS__)                \
   : (breadth) == 5 ? launch(strip_##kind##_5, __VA_ARGS__)                \
   : (breadth) == 7 ? launch(strip_##kind##_7, __VA_ARGS__)                \
                    : launch(strip_##kind##_1, __VA_ARGS__))

int up(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

// Of maps that begin at these places.
int together_of(const StripSizes& s, std::initializer_list<const void*> places) {
  int together = s.width % 4 == 0 ? 4 : s.width % 2 == 0 ? 2 : 1;
  for (const void* place : places)
    while (reinterpret_cast<uintptr_t>(place) % (together * sizeof(float))) together /= 2;
  return together;
}

Sizes sizes_of(const StripSizes& s, int longest) {
  const auto tile = [&](int64_t side) { return up(side, up(side, longest)); };
  Sizes out{static_cast<int>(s.images), static_cast<int>(s.channels), static_cast<int>(s.height),
            static_cast<int>(s.width), tile(s.height), tile(s.width), 0, 0, 1, 1,
            Divisor::of(static_cast<int>(s.width)), Divisor::of(static_cast<int>(s.height * s.width))};
  out.tiles_across = up(out.width, out.tile_width);
  out.tiles = out.tiles_across * up(out.height, out.tile_height);
  return out;
}

int along_of(const Sizes& s, const Strip& k) { return k.tall ? s.tile_height : s.tile_width; }
int across_of(const Sizes& s, const Strip& k) { return k.tall ? s.tile_width : s.tile_height; }

// What a strip of this length and breadth sees of the map, with rows of zeros around. `columns`: that a thread reads, at once.
Region region_of(const Sizes& s, const Strip& k, int length, int breadth, int anchor, int lead, int trail, int columns) {
  const int along = along_of(s, k), map = k.tall ? s.height : s.width;
  const int across = up_to(up_to(across_of(s, k), columns) + breadth - 1, columns);
  const int rows = std::min(map, along + length - 1) + lead + trail;
  const int pitch = columns == 2 && across % 4 == 0 ? across + 2 : across;
  return {lead, pitch, rows * pitch, breadth / 2, anchor, length - 1 - anchor, k.tall,
          Divisor::of(k.tall ? pitch : rows), Divisor::of(rows * pitch)};
}

struct Three {
  Strip h, v, c;
};

Three strips_of(const StripSizes& s, const float* kernel_h, const float* kernel_v, const float* kernel_c) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {{narrow(s.length_h), narrow(s.breadth_h), narrow(s.anchor_h), 0, kernel_h},
          {narrow(s.length_v), narrow(s.breadth_v), narrow(s.anchor_v), 1, kernel_v},
          {narrow(s.small), narrow(s.small), narrow(s.small / 2), 1, kernel_c}};
}

// Whether the small kernel lies on the vertical strip.
bool lies_on(const Strip& c, const Strip& v) {
  return c.breadth <= v.breadth && c.anchor <= v.anchor && c.anchor <= v.length - 1 - v.anchor;
}

bool empty(const StripSizes& s) { return s.images == 0 || s.channels == 0 || s.height == 0 || s.width == 0; }

// Three results, or, with out_h and out_i null, their sum in out_v.
const char* filters(const StripSizes& sizes, const Three& strips, const float* in_h, const float* in_v, const float* in_c,
                    bool adjoint, const float* bias, float* out_h, float* out_v, float* out_i, void* stream) {
  if (empty(sizes)) return nullptr;
  const bool joint = out_h == nullptr, folded = joint && in_v == in_c && lies_on(strips.c, strips.v);
  const bool shares = in_v == in_c && strips.c.breadth == strips.v.breadth && lies_on(strips.c, strips.v);
  const auto taps = [](const Strip& k) { return (k.length + 3 * kRun) * tap_pitch_of(k.breadth); };
  const int all_taps = taps(strips.h) + taps(strips.v) + (folded ? 0 : taps(strips.c));
  Filters f{};
  int of_a_slot = 0;
  for (int longest = kTile;; longest /= 2) {
    f = Filters{sizes_of(sizes, longest), {}, {}, {}, adjoint, joint, folded, 1, 0, 0, 0, bias, {}, {}};
    const auto pass = [&](const Strip& k, const float* in, float* out) {
      const int anchor = adjoint ? k.length - 1 - k.anchor : k.anchor;
      return Pass{k, region_of(f.s, k, k.length, k.breadth, anchor, 0, kRun - 1, kColumns), in, 0, 0, out};
    };
    f.h = pass(strips.h, in_h, out_h), f.v = pass(strips.v, in_v, out_v), f.c = pass(strips.c, in_c, out_i);
    if (shares) f.c.region = f.v.region;
    f.sum_pitch = f.s.tile_width | 1;
    of_a_slot = f.h.region.size + f.v.region.size + (folded || shares ? 0 : f.c.region.size) + f.s.tile_height * f.sum_pitch;
    if (all_taps + of_a_slot <= kTilesMost || longest == 8) break;
  }
  // As many images as keep the threads busy and fit; and more, one after the other, where there are blocks enough.
  Sizes& s = f.s;
  const auto items = [](int along, int across) { return up(along, kRun) * up(across, kColumns); };
  const int busy = up(kThreads, std::max(items(s.tile_height, s.tile_width), items(s.tile_width, s.tile_height)));
  s.slots = std::max(1, std::min({(kSharedMost - all_taps) / of_a_slot, busy, s.images}));
  const int64_t across = static_cast<int64_t>(s.tiles) * s.channels, groups = up(s.images, s.slots);
  f.rounds = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(groups, across * groups / kBlocks)));
  if (s.tiles == 1) s.together = together_of(sizes, {in_h, in_v, in_c, out_v, joint ? out_v : out_i});
  f.v.taps = taps(strips.h), f.c.taps = f.v.taps + taps(strips.v);
  f.h.place = all_taps, f.v.place = f.h.place + s.slots * f.h.region.size;
  const int after_v = f.v.place + s.slots * f.v.region.size;
  f.c.place = folded || shares ? f.v.place : after_v;
  f.sum = folded || shares ? after_v : after_v + s.slots * f.c.region.size;
  f.clear = s.tiles == 1 ? f.sum - f.h.place : 0;
  f.tile_row = Divisor::of(s.tile_width), f.tile = Divisor::of(s.tile_height * s.tile_width);
  return SWCONV_LAUNCH(filters, strips.v.breadth == strips.h.breadth ? strips.v.breadth : 1, f, across, up(groups, f.rounds),
                       kThreads, f.sum + static_cast<int64_t>(s.slots) * s.tile_height * f.sum_pitch, stream);
}

// Everything but pointers to maps. `floats`: what a block takes of shared memory. No slots: the strips are too long.
Correlations correlations_of(const StripSizes& sizes, const Three& strips, bool folded, int64_t* floats) {
  const bool rides = !folded && strips.c.breadth == strips.v.breadth && lies_on(strips.c, strips.v);
  Correlations c{};
  for (int longest = kTile;; longest /= 2) {
    c = Correlations{sizes_of(sizes, longest), {}, nullptr, nullptr, strips.c, 0, 0, 0, static_cast<int>(strip_taps(sizes)), 0,
                     folded, nullptr};
    int offset = 0, most_breadth = 1, most_items = 1;
    const int small_offset = strips.h.length * strips.h.breadth + strips.v.length * strips.v.breadth;
    for (const Strip* k : {&strips.h, &strips.v, &strips.c}) {
      if (k == &strips.c && (folded || rides)) continue;
      Correlation& p = c.parts[c.count++];
      const int map = k->tall ? c.s.height : c.s.width, skip = std::max(0, k->anchor - (map - 1));
      const int reach = std::min(k->length, k->anchor + map) - skip;
      p = {*k, region_of(c.s, *k, k->length, k->breadth, k->anchor, kRun - 1, 2 * (kRun - 1), 2),
           region_of(c.s, *k, 1, 1, 0, 0, kRun - 1, 2), nullptr, offset, up(reach, kRun), up(across_of(c.s, *k), 2),
           skip, reach, rides && k == &strips.v, small_offset};
      offset += k->length * k->breadth;
      c.region = std::max(c.region, p.region.size), c.grad = std::max(c.grad, p.grad_region.size);
      most_breadth = std::max(most_breadth, k->breadth <= 7 ? k->breadth : 1);
      most_items = std::max(most_items, (p.runs + p.rider_runs) * p.pairs);
    }
    const int sums = kGradThreads * most_breadth * kRun, of_a_slot = c.region + 2 * c.grad;
    if ((of_a_slot <= kTilesMost && most_items <= kGradThreads) || longest == 8) {
      const int fit = std::max(kSharedMost / of_a_slot, 1), busy = kGradThreads / most_items;
      c.s.slots = std::min({fit, busy, std::max(c.s.images, 1)});
      const int64_t groups = up(c.s.images, std::max(c.s.slots, 1));
      c.chunk = c.s.slots * static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(groups, groups * c.s.channels / kBlocks)));
      *floats = std::max<int64_t>(static_cast<int64_t>(c.s.slots) * of_a_slot, sums);
      c.region *= c.s.slots, c.grad *= c.s.slots;
      return c;
    }
  }
}

}  // namespace

const char* strip_branches_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                                const float* kernel_c, float* h, float* v, float* i, void* stream) {
  return filters(s, strips_of(s, kernel_h, kernel_v, kernel_c), x, x, x, false, nullptr, h, v, i, stream);
}

const char* strip_mix_cuda(const StripSizes& s, const float* x, const float* kernel_h, const float* kernel_v,
                           const float* kernel_c, const float* bias, float* y, void* stream) {
  return filters(s, strips_of(s, kernel_h, kernel_v, kernel_c), x, x, x, false, bias, nullptr, y, nullptr, stream);
}

const char* strip_branches_adjoint_cuda(const StripSizes& s, const float* grad_h, const float* grad_v,
                                        const float* grad_i, const float* kernel_h, const float* kernel_v,
                                        const float* kernel_c, float* grad_x, void* stream) {
  return filters(s, strips_of(s, kernel_h, kernel_v, kernel_c), grad_h, grad_v, grad_i, true, nullptr, nullptr, grad_x,
                 nullptr, stream);
}

int64_t strip_chunks_cuda(const StripSizes& s) {
  int64_t floats;
  if (empty(s)) return 0;
  return up(s.images, std::max(correlations_of(s, strips_of(s, nullptr, nullptr, nullptr), false, &floats).chunk, 1));
}

const char* strip_branches_backward_cuda(const StripSizes& s, const float* grad_h, const float* grad_v,
                                         const float* grad_i, const float* x, const float* kernel_h,
                                         const float* kernel_v, const float* kernel_c, float* grad_x, float* partial,
                                         float* grad_kernel_h, float* grad_kernel_v, float* grad_kernel_c,
                                         void* stream) {
  const Three strips = strips_of(s, kernel_h, kernel_v, kernel_c);
  if (const char* failed = strip_branches_adjoint_cuda(s, grad_h, grad_v, grad_i, kernel_h, kernel_v, kernel_c, grad_x, stream))
    return failed;
  const int64_t chunks = strip_chunks_cuda(s), count = s.channels * strip_taps(s);
  if (chunks > 0) {
    int64_t floats;
    Correlations c = correlations_of(s, strips, grad_v == grad_i && lies_on(strips.c, strips.v), &floats);
    if (c.s.slots == 0) return "the gradient of strips this long is not made for; SWCONV_NATIVE=0 takes plain torch";
    c.x = x, c.rider_grad = grad_i, c.partial = partial;
    if (c.s.tiles == 1) c.s.together = together_of(s, {x, grad_h, grad_v, grad_i});
    c.parts[0].grad = grad_h, c.parts[1].grad = grad_v, c.parts[2].grad = grad_i;
    if (const char* failed =
            SWCONV_LAUNCH(correlations, strips.v.breadth == strips.h.breadth ? strips.v.breadth : 1, c, s.channels, chunks,
                          kGradThreads, floats, stream))
      return failed;
  }
  if (count == 0) return nullptr;
  return add_partial({static_cast<int>(chunks), static_cast<int>(s.channels), static_cast<int>(s.length_h * s.breadth_h),
                      static_cast<int>(s.length_v * s.breadth_v), static_cast<int>(s.small * s.small), partial,
                      grad_kernel_h, grad_kernel_v, grad_kernel_c},
                     count, stream);
}

}  // namespace swconv
