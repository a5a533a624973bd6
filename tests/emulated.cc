// The library's C ABI over a pipe, for a library of another machine that runs under an emulator: reads calls from
// standard input and answers on standard output, until it ends (tests/emulated.py is the other end).
//
// A call: which (below), the instruction set's name, the argument structure, the regions of memory that its pointers
// name, and for each pointer its place in the structure and its region (-1: null). The answer: an error ("" if there is
// none), then all regions. Numbers are int64, texts and memory a length and bytes, all little-endian.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

extern "C" {
const char* specquant_isa(int32_t index);
int64_t specquant_attention_size();
int32_t specquant_isa_supported(const char* name);
const char* specquant_run(const void* problem, const char* isa);
const char* specquant_attend(const void* attention, const char* isa);
const char* specquant_quantize(const float* u, int64_t n, int32_t bits, int64_t group, float clip, int8_t* levels,
                               float* scale, const char* isa);
}

namespace {

enum Call : int64_t { kList, kRun, kAttend, kQuantize };

struct Quantize {
  int64_t n, group;
  int32_t bits;
  float clip;
  const float* u;
  int8_t* levels;
  float* scale;
};

void read(void* to, size_t size) {
  if (size && std::fread(to, 1, size, stdin) != size) std::exit(0);
}
int64_t read_number() {
  int64_t value;
  read(&value, sizeof value);
  return value;
}
std::string read_text() {
  std::string text(size_t(read_number()), '\0');
  read(text.data(), text.size());
  return text;
}
void write(const void* from, size_t size) {
  const int64_t length = int64_t(size);
  std::fwrite(&length, sizeof length, 1, stdout);
  if (size) std::fwrite(from, 1, size, stdout);
}

std::string list() {
  std::string all = std::to_string(specquant_attention_size()) + "\n";
  for (int32_t i = 0; const char* name = specquant_isa(i); ++i)
    all += std::string(name) + (specquant_isa_supported(name) ? " 1\n" : " 0\n");
  return all;
}

const char* call(int64_t which, const void* arguments, const char* isa) {
  if (which == kRun) return specquant_run(arguments, isa);
  if (which == kAttend) return specquant_attend(arguments, isa);
  const auto* a = static_cast<const Quantize*>(arguments);
  return specquant_quantize(a->u, a->n, a->bits, a->group, a->clip, a->levels, a->scale, isa);
}

}  // namespace

int main() {
  for (;;) {
    const int64_t which = read_number();
    const std::string isa = read_text();
    std::string arguments = read_text();
    // Blocks of their exact size, so that an emulator or a sanitizer may see what lies past their ends.
    std::vector<std::pair<std::unique_ptr<char[]>, size_t>> regions;
    for (int64_t count = read_number(); count > 0; --count) {
      const size_t size = size_t(read_number());
      regions.emplace_back(new char[size], size);
      read(regions.back().first.get(), size);
    }
    for (int64_t count = read_number(); count > 0; --count) {
      const int64_t at = read_number(), region = read_number();
      const char* const pointer = region < 0 ? nullptr : regions[size_t(region)].first.get();
      std::memcpy(&arguments[size_t(at)], &pointer, sizeof pointer);
    }
    std::string answer;
    if (which == kList) {
      answer = list();
    } else if (const char* error = call(which, arguments.data(), isa.empty() ? nullptr : isa.c_str())) {
      answer = error;
    }
    write(answer.data(), answer.size());
    for (const auto& [memory, size] : regions) write(memory.get(), size);
    std::fflush(stdout);
  }
}
