/* SPDX-License-Identifier: Apache-2.0
 * alu.cpp - arithmetic, comparison, logic and moves: PTX ISA, "Integer Arithmetic Instructions",
 * "Floating Point Instructions", "Comparison and Selection Instructions", "Logic and Shift
 * Instructions", "mov".
 *
 * A result is uninitialised in a lane where one of its operands is. Floats are IEEE singles,
 * rounded to nearest even, subnormals kept unless .ftz says otherwise. A 16-bit register is the low
 * half of its slot's word, the high half is 0.
 */
#include <algorithm>
#include <cmath>

#include "half.h"

namespace {

template <class T> struct Stored {
    using type = T;
};
template <> struct Stored<u16> {
    using type = u32;
};
template <> struct Stored<int16_t> {
    using type = u32;
};

/* How results go into a slot: sub-word ones as an unsigned word. */
template <class T> typename Stored<T>::type stored(T x) {
    if constexpr (sizeof(T) == 2)
        return (u16)x;
    else
        return x;
}

template <class T, T f(T)> void unary(Warp &w, const Ins &, const int *o, u32 mask) {
    using S = typename Stored<T>::type;
    S *d = w.at<S>(o[0]);
    const S *a = w.at<S>(o[1]);
    lanes(mask, [&](int l) { d[l] = stored(f((T)a[l])); });
    w.define(o[0], mask, w.defined[o[1]]);
}

template <class T, T f(T, T)> void binary(Warp &w, const Ins &, const int *o, u32 mask) {
    using S = typename Stored<T>::type;
    S *d = w.at<S>(o[0]);
    const S *a = w.at<S>(o[1]), *b = w.at<S>(o[2]);
    lanes(mask, [&](int l) { d[l] = stored(f((T)a[l], (T)b[l])); });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

template <class T, T f(T, T, T)> void ternary(Warp &w, const Ins &, const int *o, u32 mask) {
    T *d = w.at<T>(o[0]);
    const T *a = w.at<T>(o[1]), *b = w.at<T>(o[2]), *c = w.at<T>(o[3]);
    lanes(mask, [&](int l) { d[l] = f(a[l], b[l], c[l]); });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]] & w.defined[o[3]]);
}

/* The second operand is a 32-bit count, whatever the type: "shl", "shr". */
template <class T, T f(T, u32)> void shift(Warp &w, const Ins &, const int *o, u32 mask) {
    using S = typename Stored<T>::type;
    S *d = w.at<S>(o[0]);
    const S *a = w.at<S>(o[1]);
    const u32 *b = w.at<u32>(o[2]);
    if constexpr (sizeof(T) == 8) { /* d may lie over b */
        u32 count[LANES];
        lanes(mask, [&](int l) { count[l] = b[l]; });
        lanes(mask, [&](int l) { d[l] = f((T)a[l], count[l]); });
    } else {
        lanes(mask, [&](int l) { d[l] = stored(f((T)a[l], b[l])); });
    }
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

/* "mul", .wide: from T to the twice as wide D. */
template <class D, class T> void wide(Warp &w, const Ins &, const int *o, u32 mask) {
    D *d = w.at<D>(o[0]), result[LANES];
    const u32 *a = w.at<u32>(o[1]), *b = w.at<u32>(o[2]);
    lanes(mask, [&](int l) { result[l] = (D)(T)a[l] * (D)(T)b[l]; });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

template <class T, bool f(T, T)> void compare(Warp &w, const Ins &, const int *o, u32 mask) {
    using S = typename Stored<T>::type;
    const S *a = w.at<S>(o[1]), *b = w.at<S>(o[2]);
    u32 result = 0;
    for (int l = 0; l < LANES; l++)
        result |= (u32)f((T)a[l], (T)b[l]) << l;
    u32 &d = w.r[o[0]].x[0];
    d = (d & ~mask) | (result & mask);
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

/* setp.lt.or: the comparison or a predicate. */
void less_or(Warp &w, const Ins &, const int *o, u32 mask) {
    const float *a = w.at<float>(o[1]), *b = w.at<float>(o[2]);
    u32 result = w.r[o[3]].x[0];
    for (int l = 0; l < LANES; l++)
        result |= (u32)(a[l] < b[l]) << l;
    u32 &d = w.r[o[0]].x[0];
    d = (d & ~mask) | (result & mask);
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]] & w.defined[o[3]]);
}

/* selp: only the operand that is chosen has to be known. */
template <class T> void select(Warp &w, const Ins &, const int *o, u32 mask) {
    T *d = w.at<T>(o[0]);
    const T *a = w.at<T>(o[1]), *b = w.at<T>(o[2]);
    u32 p = w.r[o[3]].x[0];
    u32 known = w.defined[o[3]] & ((p & w.defined[o[1]]) | (~p & w.defined[o[2]]));
    lanes(mask, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
    w.define(o[0], mask, known);
}

template <u32 f(u32, u32)> void predicates(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 result = f(w.r[o[1]].x[0], w.r[o[2]].x[0]), &d = w.r[o[0]].x[0];
    u32 known = w.defined[o[1]] & w.defined[o[2]];
    d = (d & ~mask) | (result & mask);
    w.define(o[0], mask, known);
}

template <bool inverted> void predicate(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 a = w.r[o[1]].x[0], &d = w.r[o[0]].x[0];
    d = (d & ~mask) | ((inverted ? ~a : a) & mask);
    w.define(o[0], mask, w.defined[o[1]]);
}

/* "mov", packing: {low, high} of 16 bits to 32, of 32 bits to 64; and back. */
void pack_32(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 *d = w.at<u32>(o[0]);
    const u32 *low = w.at<u32>(o[1]), *high = w.at<u32>(o[2]);
    lanes(mask, [&](int l) { d[l] = (low[l] & 0xffffu) | high[l] << 16; });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

void unpack_32(Warp &w, const Ins &, const int *o, u32 mask) {
    const Slot a = w.r[o[2]];
    u32 known = w.defined[o[2]];
    u32 *low = w.at<u32>(o[0]), *high = w.at<u32>(o[1]);
    lanes(mask, [&](int l) { low[l] = a.x[l] & 0xffffu; });
    lanes(mask, [&](int l) { high[l] = a.x[l] >> 16; });
    w.define(o[0], mask, known);
    w.define(o[1], mask, known);
}

void pack_64(Warp &w, const Ins &, const int *o, u32 mask) {
    u64 *d = w.at<u64>(o[0]), result[LANES];
    const u32 *low = w.at<u32>(o[1]), *high = w.at<u32>(o[2]);
    lanes(mask, [&](int l) { result[l] = (u64)high[l] << 32 | low[l]; });
    lanes(mask, [&](int l) { d[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]]);
}

void unpack_64(Warp &w, const Ins &, const int *o, u32 mask) {
    u64 a[LANES];
    u32 known = w.defined[o[2]];
    lanes(mask, [&](int l) { a[l] = w.at<u64>(o[2])[l]; });
    u32 *low = w.at<u32>(o[0]), *high = w.at<u32>(o[1]);
    lanes(mask, [&](int l) { low[l] = (u32)a[l]; });
    lanes(mask, [&](int l) { high[l] = (u32)(a[l] >> 32); });
    w.define(o[0], mask, known);
    w.define(o[1], mask, known);
}

/* bfi: f = b with the low `length` bits of a put in at `at`. */
void insert_bits(Warp &w, const Ins &, const int *o, u32 mask) {
    u32 *f = w.at<u32>(o[0]), result[LANES];
    const u32 *a = w.at<u32>(o[1]), *b = w.at<u32>(o[2]), *c = w.at<u32>(o[3]),
              *d = w.at<u32>(o[4]);
    lanes(mask, [&](int l) {
        u32 at = c[l] & 0xff, length = d[l] & 0xff;
        result[l] = b[l];
        for (u32 i = 0; i < length && at + i < 32; i++)
            result[l] = (result[l] & ~(1u << (at + i))) | (a[l] >> i & 1) << (at + i);
    });
    lanes(mask, [&](int l) { f[l] = result[l]; });
    w.define(o[0], mask, w.defined[o[1]] & w.defined[o[2]] & w.defined[o[3]] & w.defined[o[4]]);
}

/* "prmt", without a mode: nibble i of c says which of the 8 bytes of {b, a} is byte i of d; its top
 * bit, that byte's sign eight times instead. */
u32 permuted(u32 a, u32 b, u32 c) {
    u64 bytes = (u64)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; i++) {
        u32 pick = c >> 4 * i & 15;
        u32 byte = (u32)(bytes >> 8 * (pick & 7) & 255);
        d |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return d;
}

void permute(Warp &w, const Ins &i, const int *o, u32 mask) {
    ternary<u32, permuted>(w, i, o, mask);
}

template <class T> T add(T a, T b) { return (T)(a + b); }
template <class T> T sub(T a, T b) { return (T)(a - b); }
template <class T> T mul(T a, T b) { return (T)(a * b); }
template <class T> T mul_add(T a, T b, T c) { return (T)(a * b + c); }
template <class T> T smaller(T a, T b) { return a < b ? a : b; }
template <class T> T larger(T a, T b) { return a > b ? a : b; }
template <class T> T both(T a, T b) { return (T)(a & b); }
template <class T> T either(T a, T b) { return (T)(a | b); }
template <class T> T one_of(T a, T b) { return (T)(a ^ b); }
/* "shf", .l.wrap: the upper word of {b, a} shifted to the left. */
u32 funnel_left(u32 a, u32 b, u32 c) { return (u32)(((u64)b << 32 | a) << (c & 31) >> 32); }
u32 highest(u32 a) { return a ? 31u - (u32)__builtin_clz(a) : 0xffffffffu; }
template <class T> T inverted(T a) { return (T)~a; }
template <class T> T same(T a) { return a; }
template <class T> bool eq(T a, T b) { return a == b; }
template <class T> bool ne(T a, T b) { return a != b; }
template <class T> bool lt(T a, T b) { return a < b; }
template <class T> bool le(T a, T b) { return a <= b; }
template <class T> bool gt(T a, T b) { return a > b; }
template <class T> bool ge(T a, T b) { return a >= b; }
bool geu(float a, float b) { return !(a < b); }
bool ltu(float a, float b) { return !(a >= b); }
bool leu(float a, float b) { return !(a > b); }
bool neu(float a, float b) { return !(a == b); }
bool num(float a, float b) { return a == a && b == b; }
bool unordered(float a, float b) { return a != a || b != b; }

/* "min", "max": .relu clamps the result to 0 if it is negative. */
int min_relu(int a, int b) { return larger(smaller(a, b), 0); }
int max_relu(int a, int b) { return larger(larger(a, b), 0); }
int high_s32(int a, int b) { return (int)((i64)a * b >> 32); }
u32 high_u32(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
/* "div": by zero is unspecified; -2^31 / -1 does not fit. */
int quotient(int a, int b) { return b == 0 || (b == -1 && a < -0x7fffffff) ? 0x5bad : a / b; }
int remainder_of(int a, int b) { return b == 0 || b == -1 ? (b ? 0 : 0x5bad) : a % b; }
u32 quotient_u(u32 a, u32 b) { return b ? a / b : ALL; }
u32 remainder_u(u32 a, u32 b) { return b ? a % b : ALL; }

template <class T> T left(T a, u32 n) { return n < 8 * sizeof(T) ? (T)(a << n) : 0; }
/* Arithmetic for signed types; more than the width counts as the width. */
template <class T> T right(T a, u32 n) {
    if (n < 8 * sizeof(T))
        return (T)(a >> n);
    return a < 0 ? (T)-1 : 0;
}

float add_f(float a, float b) { return a + b; }
float sub_f(float a, float b) { return a - b; }
float mul_f(float a, float b) { return a * b; }
float div_f(float a, float b) { return a / b; }
double add_d(double a, double b) { return a + b; }
double sub_d(double a, double b) { return a - b; }
double div_d(double a, double b) { return a / b; }
float fma_f(float a, float b, float c) { return fmaf(a, b, c); }
float neg_f(float a) { return float_of(bits_of(a) ^ 0x80000000u); }
float abs_f(float a) { return float_of(bits_of(a) & 0x7fffffffu); }
int neg_s(int a) { return (int)(0u - (u32)a); }
/* max: of a NaN and a number the number; +0 is larger than -0. */
float max_f(float a, float b) {
    if (a != a)
        return b != b ? float_of(0x7fffffffu) : b;
    if (b != b)
        return a;
    return a == b ? float_of(bits_of(a) & bits_of(b)) : a > b ? a : b;
}

/* min: the same, and -0 is smaller than +0. */
float min_f(float a, float b) {
    return a != a && b != b ? float_of(0x7fffffffu) : neg_f(max_f(neg_f(a), neg_f(b)));
}

#define INTEGERS(t, T)                                                                             \
    {"add." t, nullptr, binary<T, add<T>>}, {"sub." t, nullptr, binary<T, sub<T>>},                \
        {"min." t, nullptr, binary<T, smaller<T>>}, {"max." t, nullptr, binary<T, larger<T>>},     \
        {"setp.eq." t, "p", compare<T, eq<T>>}, {"setp.ne." t, "p", compare<T, ne<T>>},            \
        {"setp.lt." t, "p", compare<T, lt<T>>}, {"setp.le." t, "p", compare<T, le<T>>},            \
        {"setp.gt." t, "p", compare<T, gt<T>>}, {                                                  \
        "setp.ge." t, "p", compare<T, ge<T>>                                                       \
    }
#define BITS(t, T)                                                                                 \
    {"and." t, nullptr, binary<T, both<T>>}, {"or." t, nullptr, binary<T, either<T>>},             \
        {"xor." t, nullptr, binary<T, one_of<T>>}, {"setp.eq." t, "p", compare<T, eq<T>>}, {       \
        "setp.ne." t, "p", compare<T, ne<T>>                                                       \
    }
#define FLOATS(name) {"setp." #name ".f32", "p", compare<float, name<float>>}

/* Entries of a macro name no operands; `completed` writes them, from the type's width. */
const std::vector<Op> SHORT_HAND = {
    INTEGERS("s16", int16_t), INTEGERS("u16", u16), INTEGERS("s32", int),
    INTEGERS("u32", u32),     INTEGERS("s64", i64), INTEGERS("u64", u64),
    BITS("b16", u16),         BITS("b32", u32),     BITS("b64", u64),
};

} // namespace

const std::vector<Op> ALU_OPS = [] {
    static std::vector<std::string> names;
    names.reserve(2 * SHORT_HAND.size());
    std::vector<Op> all;
    for (const Op &op : SHORT_HAND) {
        std::string width = std::string(op.name).substr(std::string(op.name).size() - 2);
        std::string letter = width == "16" ? "h" : width == "32" ? "r" : "l";
        names.push_back(std::string("=") + (op.operands ? "p" : letter) + " " + letter + " " +
                        letter);
        all.push_back({op.name, names.back().c_str(), op.run});
    }
    const std::vector<Op> others = {
        {"mul.lo.s32", "=r r r", binary<u32, mul<u32>>},
        {"mul.lo.u32", "=r r r", binary<u32, mul<u32>>},
        {"mul.lo.s64", "=l l l", binary<u64, mul<u64>>},
        {"mul.hi.s32", "=r r r", binary<int, high_s32>},
        {"mul.hi.u32", "=r r r", binary<u32, high_u32>},
        {"mul.wide.s16", "=r h h", wide<int, int16_t>},
        {"mul.wide.s32", "=l r r", wide<i64, int>},
        {"mul.wide.u32", "=l r r", wide<u64, u32>},
        {"mad.lo.s32", "=r r r r", ternary<u32, mul_add<u32>>},
        {"mad.lo.s64", "=l l l l", ternary<u64, mul_add<u64>>},
        {"min.relu.s32", "=r r r", binary<int, min_relu>},
        {"max.relu.s32", "=r r r", binary<int, max_relu>},
        {"div.s32", "=r r r", binary<int, quotient>},
        {"div.u32", "=r r r", binary<u32, quotient_u>},
        {"div.rn.f32", "=r r r", binary<float, div_f>},
        {"rem.s32", "=r r r", binary<int, remainder_of>},
        {"rem.u32", "=r r r", binary<u32, remainder_u>},
        {"neg.s32", "=r r", unary<int, neg_s>},
        {"bfind.u32", "=r r", unary<u32, highest>},
        {"not.b32", "=r r", unary<u32, inverted<u32>>},
        {"not.b16", "=h h", unary<u16, inverted<u16>>},
        {"not.b64", "=l l", unary<u64, inverted<u64>>},
        {"shl.b16", "=h h r", shift<u16, left<u16>>},
        {"shl.b32", "=r r r", shift<u32, left<u32>>},
        {"shl.b64", "=l l r", shift<u64, left<u64>>},
        {"shr.s16", "=h h r", shift<int16_t, right<int16_t>>},
        {"shr.u16", "=h h r", shift<u16, right<u16>>},
        {"shr.s32", "=r r r", shift<int, right<int>>},
        {"shr.u32", "=r r r", shift<u32, right<u32>>},
        {"shr.b32", "=r r r", shift<u32, right<u32>>},
        {"shr.s64", "=l l r", shift<i64, right<i64>>},
        {"shr.u64", "=l l r", shift<u64, right<u64>>},
        {"shf.l.wrap.b32", "=r r r r", ternary<u32, funnel_left>},
        {"bfi.b32", "=r r r r r", insert_bits},
        {"add.f32", "=r r r", binary<float, add_f>},
        {"sub.f32", "=r r r", binary<float, sub_f>},
        {"mul.f32", "=r r r", binary<float, mul_f>},
        {"add.rn.f32", "=r r r", binary<float, add_f>},
        {"mul.rn.f32", "=r r r", binary<float, mul_f>},
        {"add.f64", "=l l l", binary<double, add_d>},
        {"sub.f64", "=l l l", binary<double, sub_d>},
        {"div.rn.f64", "=l l l", binary<double, div_d>},
        {"prmt.b32", "=r r r r", permute},
        {"fma.rn.f32", "=r r r r", ternary<float, fma_f>},
        {"neg.f32", "=r r", unary<float, neg_f>},
        {"abs.f32", "=r r", unary<float, abs_f>},
        {"max.f32", "=r r r", binary<float, max_f>},
        {"min.f32", "=r r r", binary<float, min_f>},
        FLOATS(eq),
        FLOATS(lt),
        FLOATS(le),
        FLOATS(gt),
        FLOATS(ge),
        {"setp.leu.f32", "=p r r", compare<float, leu>},
        {"setp.num.f32", "=p r r", compare<float, num>},
        {"setp.nan.f32", "=p r r", compare<float, unordered>},
        {"setp.ne.f32", "=p r r", compare<float, ne<float>>},
        {"setp.geu.f32", "=p r r", compare<float, geu>},
        {"setp.ltu.f32", "=p r r", compare<float, ltu>},
        {"setp.neu.f32", "=p r r", compare<float, neu>},
        {"setp.lt.or.f32", "=p r r p", less_or},
        {"and.pred", "=p p p", predicates<both<u32>>},
        {"or.pred", "=p p p", predicates<either<u32>>},
        {"xor.pred", "=p p p", predicates<one_of<u32>>},
        {"not.pred", "=p p", predicate<true>},
        {"mov.pred", "=p p", predicate<false>},
        {"mov.b32", "=r {h2}", pack_32},
        {"mov.b32", "{=h2} r", unpack_32},
        {"mov.b64", "=l {r2}", pack_64},
        {"mov.b64", "{=r2} l", unpack_64},
    };
    for (Op op : others)
        all.push_back({op.name, op.operands[0] == 'p' ? "=p r r" : op.operands, op.run});
    for (const char *name : {"mov.u32", "mov.s32", "mov.b32", "mov.f32"})
        all.push_back({name, "=r r", unary<u32, same<u32>>});
    for (const char *name : {"mov.u16", "mov.b16"})
        all.push_back({name, "=h h", unary<u16, same<u16>>});
    for (const char *name : {"mov.u64", "mov.b64", "mov.f64", "cvta.param.u64", "cvta.shared.u64",
                             "cvta.to.shared.u64"})
        all.push_back({name, "=l l", unary<u64, same<u64>>});
    for (const char *name : {"selp.b32", "selp.f32", "selp.s32", "selp.u32"})
        all.push_back({name, "=r r r p", select<u32>});
    for (const char *name : {"selp.b16", "selp.u16"})
        all.push_back({name, "=h h h p", select<u32>});
    for (const char *name : {"selp.b64", "selp.s64", "selp.u64"})
        all.push_back({name, "=l l l p", select<u64>});
    return all;
}();
