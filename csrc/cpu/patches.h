// SPDX-License-Identifier: Apache-2.0
// Reads the patch of a token from a packed spectrogram: what mask_gather and masked_patch_loss share.
#pragma once
#include "kernels.h"

namespace {

// Where the patch of a token lies.
struct Place {
  const float* first;  // frame 0, bin 0 of the patch
  int64_t frames;      // that lie inside the clip; the others are 0
  int64_t bin;
};

// `clip`: of the token before, to begin with; it is moved to the clip of this one. A token or a clip that does not exist
// gives no frames.
inline Place place_of(const Patches& p, int64_t token, int64_t& clip) {
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

inline void normalise_row(float* out, const float* x, const float* mean, const float* scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = (x[i] - mean[i]) * scale[i];
}

// Write the values of a patch in the order of the tokens. COUNT: patch_freq where it is known, else 0.
template <int COUNT>
inline void read_patch(float* out, const Patches& p, const Place& place) {
  const int64_t height = COUNT ? COUNT : p.patch_freq, width = p.patch_time;
  const float* mean = p.mean + place.bin;
  const float* scale = p.scale + place.bin;
  if (p.by_time) {
    int64_t t = 0;
    for (; t < place.frames; ++t) normalise_row(out + t * height, place.first + t * p.bins, mean, scale, height);
    for (int64_t i = t * height; i < width * height; ++i) out[i] = 0.0f;
    return;
  }
  for (int64_t f = 0; f < height; ++f) {
    int64_t t = 0;
    for (; t < place.frames; ++t) out[f * width + t] = (place.first[t * p.bins + f] - mean[f]) * scale[f];
    for (; t < width; ++t) out[f * width + t] = 0.0f;
  }
}

inline void read_any_patch(float* out, const Patches& p, const Place& place) {
  if (p.patch_freq == 16) {
    read_patch<16>(out, p, place);
  } else {
    read_patch<0>(out, p, place);
  }
}

}  // namespace
