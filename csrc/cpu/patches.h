// SPDX-License-Identifier: Apache-2.0
// Reads the patch of a token from a packed spectrogram: what mask_gather and masked_patch_loss share.
#pragma once
#include "kernels.h"

namespace {

// Where the patch of a token lies.
template <typename T>
struct Place {
  const T* first;  // frame 0, bin 0 of the patch
  int64_t frames;      // that lie inside the clip; the others are 0
  int64_t bin;
};

// `clip`: of the token before, to begin with; it is moved to the clip of this one. A token or a clip that does not
// exist gives no frames.
template <typename T>
inline Place<T> place_of(const Patches<T>& p, int64_t token, int64_t& clip) {
  if (token < p.cu_tokens[0] || token >= p.cu_tokens[p.clips]) return {p.frames, 0, 0};
  if (token < p.cu_tokens[clip] || token >= p.cu_tokens[clip + 1]) {
    int64_t above = p.clips;
    clip = 0;
    while (above - clip > 1) {
      const int64_t middle = (clip + above) / 2;
      if (p.cu_tokens[middle] <= token) {
        clip = middle;
      } else {
        above = middle;
      }
    }
  }
  const uint32_t t = (uint32_t)(token - p.cu_tokens[clip]), freq = (uint32_t)p.freq;
  const uint32_t columns = (uint32_t)(p.cu_tokens[clip + 1] - p.cu_tokens[clip]) / freq;
  const uint32_t divisor = p.by_time ? freq : columns;
  if (!divisor) return {p.frames, 0, 0};
  const int64_t column = p.by_time ? t / divisor : t % divisor, row = p.by_time ? t % divisor : t / divisor;
  const int64_t first = p.cu_frames[clip] + column * p.patch_time, bin = row * p.patch_freq;
  const int64_t end = p.cu_frames[clip + 1] < p.n_frames ? p.cu_frames[clip + 1] : p.n_frames;
  if (p.cu_frames[clip] < 0 || first >= end || bin + p.patch_freq > p.bins) return {p.frames, 0, 0};
  const int64_t left = end - first;
  return {p.frames + first * p.bins + bin, left < p.patch_time ? left : p.patch_time, bin};
}

// Ask for the cells of a patch ahead of their use: its rows are far apart, and what follows them is not read next. Into
// the second-level cache, which can wait for more lines at a time than the first.
template <typename T>
inline void prefetch(const Patches<T>& p, const Place<T>& place) {
  const int64_t bytes = p.patch_freq * (int64_t)sizeof(T);
  for (int64_t t = 0; t < place.frames; ++t) {
    const char* row = (const char*)(place.first + t * p.bins);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

// Write the values of a patch in the order of the tokens. COUNT: patch_freq where it is known, else 0.
template <int COUNT, typename T>
inline void read_patch(T* __restrict out, const Patches<T>& p, const Place<T>& place) {
  const int64_t height = COUNT ? COUNT : p.patch_freq, width = p.patch_time;
  const T* __restrict x = place.first;
  const T* __restrict mean = p.mean + place.bin;
  const T* __restrict scale = p.scale + place.bin;
  int64_t t = 0;
  if (p.by_time) {
    for (; t < place.frames; ++t, x += p.bins, out += height) {
      for (int64_t f = 0; f < height; ++f) out[f] = (x[f] - mean[f]) * scale[f];
    }
    for (int64_t i = 0; i < (width - t) * height; ++i) out[i] = 0;
    return;
  }
  if (COUNT == 16 && width == 16) {
    // Turned in the first-level cache, so that rows are read and written whole.
    alignas(64) T rows[256];
    for (; t < place.frames; ++t, x += p.bins) {
      for (int64_t f = 0; f < 16; ++f) rows[t * 16 + f] = (x[f] - mean[f]) * scale[f];
    }
    for (int64_t i = t * 16; i < 256; ++i) rows[i] = 0;
    for (int64_t f = 0; f < 16; ++f) {
      for (int64_t i = 0; i < 16; ++i) out[f * 16 + i] = rows[i * 16 + f];
    }
    return;
  }
  for (; t < place.frames; ++t, x += p.bins) {
    for (int64_t f = 0; f < height; ++f) out[f * width + t] = (x[f] - mean[f]) * scale[f];
  }
  for (; t < width; ++t) {
    for (int64_t f = 0; f < height; ++f) out[f * width + t] = 0;
  }
}

template <typename T>
inline void read_any_patch(T* out, const Patches<T>& p, const Place<T>& place) {
  if (p.patch_freq == 16) {
    read_patch<16>(out, p, place);
  } else {
    read_patch<0>(out, p, place);
  }
}

// The places of tokens index[first] ... index[last - 1], one after the other, each asked for AHEAD tokens before.
template <typename T>
class Places {
 public:
  Places(const Patches<T>& patches, const int32_t* index, int64_t first, int64_t last)
      : patches_(patches), index_(index), next_(first), last_(last) {
    for (int64_t i = 0; i < AHEAD; ++i) fetch(i);
  }

  Place<T> next() {
    const int64_t slot = taken_++ % AHEAD;
    const Place<T> place = ahead_[slot];
    fetch(slot);
    return place;
  }

 private:
  static const int64_t AHEAD = 32;

  void fetch(int64_t slot) {
    if (next_ >= last_) return;
    ahead_[slot] = place_of(patches_, index_[next_++], clip_);
    prefetch(patches_, ahead_[slot]);
  }

  const Patches<T>& patches_;
  const int32_t* index_;
  int64_t next_, last_, taken_ = 0, clip_ = 0;
  Place<T> ahead_[AHEAD];
};

}  // namespace
