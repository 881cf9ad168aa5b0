// Decode a part of a JPEG: libjpeg-turbo skips the rows above it and the columns beside it.
//
// Calls the library that Pillow has brought, through pointers, so that no headers are needed.
// The structures below are the public interface of libjpeg at version 62 on 64-bit systems, up to
// the last member that is used; the library itself compares version and size, and refuses another.

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

namespace {

constexpr int kVersion = 62;
constexpr size_t kDecompressSize = 632;
constexpr int kColourRgb = 2;
constexpr int kDctFast = 1;
constexpr int kHeaderOk = 1;
static_assert(sizeof(void *) == 8, "the structures are those of 64-bit systems");

struct Decompress;

struct ErrorManager {
  void (*error_exit)(Decompress *);
  void (*emit_message)(Decompress *, int);
  void (*output_message)(Decompress *);
  void (*format_message)(Decompress *, char *);
  void (*reset)(Decompress *);
  int code;
  char parameters[80];
  int trace_level;
  long num_warnings;
  const char *const *messages;
  int last_message;
  const char *const *further_messages;
  int first_further, last_further;
};

struct Decompress {
  ErrorManager *error;
  void *memory, *progress, *client;
  int is_decompressor, state;
  void *source;
  unsigned image_width, image_height;
  int num_components, stored_colours, out_colours;
  unsigned scale_numerator, scale_denominator;
  double gamma;
  int buffered, raw, dct, fancy_upsampling, block_smoothing, quantize, dither, two_pass;
  int num_colours, one_pass, external, second_pass;
  unsigned output_width, output_height;
  char rest[kDecompressSize];
};

struct Library {
  ErrorManager *(*std_error)(ErrorManager *);
  void (*create)(Decompress *, int, size_t);
  void (*destroy)(Decompress *);
  void (*memory_source)(Decompress *, const unsigned char *, unsigned long);
  int (*read_header)(Decompress *, int);
  int (*start)(Decompress *);
  unsigned (*read)(Decompress *, unsigned char **, unsigned);
  unsigned (*skip)(Decompress *, unsigned);
  void (*crop)(Decompress *, unsigned *, unsigned *);
};

Library library;

struct Errors : ErrorManager {
  jmp_buf back;
};

[[noreturn]] void leave(Decompress *file) {
  longjmp(static_cast<Errors *>(file->error)->back, 1);
}

void count_warning(Decompress *file, int level) {
  if (level < 0) file->error->num_warnings++;
}

template <typename Function> bool find(void *handle, const char *name, Function &function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

}  // namespace

extern "C" {

// Find the functions in the shared library at `path`; 0 if all are there.
int hvd_lars_region_load(const char *path) {
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return 1;
  bool found = find(handle, "jpeg_std_error", library.std_error) &&
               find(handle, "jpeg_CreateDecompress", library.create) &&
               find(handle, "jpeg_destroy_decompress", library.destroy) &&
               find(handle, "jpeg_mem_src", library.memory_source) &&
               find(handle, "jpeg_read_header", library.read_header) &&
               find(handle, "jpeg_start_decompress", library.start) &&
               find(handle, "jpeg_read_scanlines", library.read) &&
               find(handle, "jpeg_skip_scanlines", library.skip) &&
               find(handle, "jpeg_crop_scanline", library.crop);
  return found ? 0 : 1;
}

// Write rows [top, top + height) and columns [left, left + width) of the image, decoded at
// 1 / shrink of its size, to `out`: (height, width, 3) bytes of RGB.  Returns 0, or 1 if the part
// is not inside the image, or the library finds the slightest damage.
int hvd_lars_region_decode(const unsigned char *data, unsigned long size, int shrink, unsigned top,
                           unsigned left, unsigned height, unsigned width, unsigned char *out) {
  Decompress file;
  Errors errors;
  std::memset(&file, 0, sizeof file);
  file.error = library.std_error(&errors);
  errors.error_exit = leave;
  errors.emit_message = count_warning;
  unsigned char *volatile line = nullptr;
  volatile int failed = 1;
  if (setjmp(errors.back) == 0) {
    library.create(&file, kVersion, kDecompressSize);
    library.memory_source(&file, data, size);
    if (library.read_header(&file, 1) == kHeaderOk) {
      file.out_colours = kColourRgb;
      file.scale_numerator = 1;
      file.scale_denominator = static_cast<unsigned>(shrink);
      file.dct = kDctFast;
      file.fancy_upsampling = 0;
      library.start(&file);
      if (height > 0 && width > 0 && height <= file.output_height &&
          top <= file.output_height - height && width <= file.output_width &&
          left <= file.output_width - width) {
        unsigned first = left, columns = width;
        library.crop(&file, &first, &columns);
        line = static_cast<unsigned char *>(std::malloc(3 * static_cast<size_t>(columns) + 64));
        if (top > 0) library.skip(&file, top);
        size_t shift = 3 * static_cast<size_t>(left - first), bytes = 3 * static_cast<size_t>(width);
        unsigned char *row = line;
        unsigned done = 0;
        while (line != nullptr && done < height && library.read(&file, &row, 1) == 1)
          std::memcpy(out + bytes * done++, line + shift, bytes);
        failed = done < height || errors.num_warnings > 0;
      }
    }
  }
  library.destroy(&file);
  std::free(line);
  return failed;
}

}  // extern "C"
