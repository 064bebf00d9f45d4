// What the sources need of C++'s own library, whose headers some compilers have only together with a library that takes
// minutes to build.

#pragma once

template <class T> static constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> static constexpr T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline void swap(T &a, T &b) {
    const T before = a;
    a = b;
    b = before;
}
template <class T> static inline void fill(T *from, T *to, T value) {
    for (; from < to; from++) *from = value;
}
