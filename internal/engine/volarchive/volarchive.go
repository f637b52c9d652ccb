// Package volarchive writes and reads archives of volumes: a zstd stream of a tar
// that any tool can unpack. Its first entry, "servin-volume.json", describes the
// volume; the volume's own files lie below "data/"; the last entry,
// "servin-end.json", holds the SHA-256 of everything before it and the number of
// entries, so that an archive that was cut off, damaged or put together from two
// is recognised before anything is replaced. Package engine imports it.
package volarchive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash"
	"io"
	"math"
	"os"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/engine/archive"
	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	version   = 1
	headEntry = "servin-volume.json"
	endEntry  = "servin-end.json"
	dataEntry = "data"

	maxJSON = 1 << 20
	// maxWindow bounds what a hostile stream makes us allocate; our own have 8 MiB.
	maxWindow = 64 << 20
)

// Head describes the volume that an archive was made of.
type Head struct {
	Version int
	Name    string
	Driver  string
	Created string            `json:",omitempty"` // of the volume
	Labels  map[string]string `json:",omitempty"`
	Options map[string]string `json:",omitempty"`
	At      time.Time         // of the archive
}

type end struct {
	SHA256  string
	Entries int64
	Bytes   int64 // of tar before this entry
}

// Write streams an archive of the directory to w.
func Write(ctx context.Context, w io.Writer, dir *os.File, h Head) (api.VolumeArchive, error) {
	var sum api.VolumeArchive
	h.Version, h.At = version, time.Now().UTC()
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(2), zstd.WithEncoderCRC(true), zstd.WithWindowSize(8<<20))
	if err != nil {
		return sum, err
	}
	defer z.Close()
	c := &counter{sum: sha256.New()}
	tw := tar.NewWriter(io.MultiWriter(z, c))
	if err := putJSON(tw, headEntry, h, h.At); err != nil {
		return sum, err
	}
	if err := archive.In(dir).Add(ctx, "/", tw, archive.WriteOptions{As: dataEntry, Faithful: true, OneFileSystem: true}); err != nil {
		return sum, err
	}
	if err := tw.Flush(); err != nil {
		return sum, err
	}
	e := end{SHA256: hex.EncodeToString(c.sum.Sum(nil)), Bytes: c.n}
	if err := putJSON(tw, endEntry, e, h.At); err != nil {
		return sum, err
	}
	if err := tw.Close(); err != nil {
		return sum, err
	}
	return api.VolumeArchive{Name: h.Name, SHA256: e.SHA256, Bytes: e.Bytes}, z.Close()
}

func putJSON(tw *tar.Writer, name string, v any, at time.Time) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(b)), ModTime: at, Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err = tw.Write(b)
	return err
}

type counter struct {
	sum hash.Hash
	n   int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.sum.Write(p)
}

// Decompress gives the content of a stream that may be compressed with zstd or
// gzip.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, fault.New(fault.Invalid, "cannot read the archive: %w", err)
		}
		return z, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, fault.New(fault.Invalid, "cannot read the archive: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

// Read unpacks an archive. open is told what the archive says of itself and gives
// the directory to fill. Whoever keeps that directory must throw it away when Read
// fails: whether the archive is whole shows at its end.
func Read(ctx context.Context, r io.Reader, devices bool, open func(Head) (*os.File, error)) (api.VolumeArchive, error) {
	var out api.VolumeArchive
	z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return out, damaged(err)
	}
	defer z.Close()
	x := &reader{src: &tee{r: z, sum: sha256.New(), direct: math.MaxInt64}}
	h, err := x.head()
	if err != nil {
		return out, err
	}
	dir, err := open(h)
	if err != nil {
		return out, err
	}
	err = archive.In(dir).Extract(ctx, "/", x.src, archive.ExtractOptions{
		Entry: x.entry, Top: true, Sparse: true, Faithful: true, NoDevices: !devices,
	})
	if err != nil {
		return out, err
	}
	if !x.ended {
		return out, fault.New(fault.Invalid, "cannot restore: the archive is cut off: its last entry is missing")
	}
	// What follows the tar must be nothing but the end of the stream, intact.
	if n, err := io.Copy(io.Discard, io.LimitReader(z, 1<<20)); err != nil {
		return out, damaged(err)
	} else if n == 1<<20 {
		return out, fault.New(fault.Invalid, "cannot restore: something follows the archive")
	}
	return api.VolumeArchive{Name: h.Name, SHA256: x.end.SHA256, Bytes: x.end.Bytes}, nil
}

func damaged(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fault.New(fault.Invalid, "cannot restore: this is no archive of a volume, or it is damaged: %w", err)
}

// tee hashes what is read. Whether a header belongs to the sum shows only once it
// was read: so it hashes the next direct bytes at once and keeps what follows back
// until it is told.
type tee struct {
	r      io.Reader
	sum    hash.Hash
	n      int64
	direct int64
	late   []byte
}

// maxLate bounds padding and headers; those of attributes are the longest.
const maxLate = 4 << 20

func (t *tee) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	now := min(int64(n), t.direct)
	t.sum.Write(p[:now])
	t.n += now
	t.direct -= now
	t.late = append(t.late, p[now:n]...)
	if len(t.late) > maxLate {
		return n, damaged(errors.New("a header is too long"))
	}
	if err != nil && err != io.EOF {
		err = damaged(err)
	}
	return n, err
}

// settle hashes the first n bytes of what was kept back and forgets the rest; it
// hashes all for n < 0.
func (t *tee) settle(n int) {
	if n < 0 || n > len(t.late) {
		n = len(t.late)
	}
	t.sum.Write(t.late[:n])
	t.n += int64(n)
	t.late = t.late[:0]
}

type reader struct {
	src   *tee
	pad   int // bytes of padding that follow the current entry
	end   end
	ended bool
}

// head reads the first entry, with a reader of its own: tar readers take no more
// than they need.
func (x *reader) head() (Head, error) {
	var h Head
	tr := tar.NewReader(x.src)
	th, err := tr.Next()
	if err != nil {
		return h, damaged(err)
	}
	if th.Name != headEntry || th.Typeflag != tar.TypeReg || th.Size > maxJSON {
		return h, fault.New(fault.Invalid, "cannot restore: this is no archive that backup made; a plain tar is read by import")
	}
	b := make([]byte, th.Size)
	if _, err := io.ReadFull(tr, b); err != nil {
		return h, damaged(err)
	}
	if _, err := io.CopyN(io.Discard, x.src, padding(th.Size)); err != nil {
		return h, damaged(err)
	}
	if err := json.Unmarshal(b, &h); err != nil {
		return h, damaged(err)
	}
	if h.Version != version {
		return h, fault.New(fault.Unsupported, "cannot restore: the archive is of version %d, this engine reads version %d", h.Version, version)
	}
	x.src.direct = 0
	return h, nil
}

func padding(size int64) int64 { return -size & 511 }

// entry sees every entry after the head: it keeps the sum, gives files their place
// in the volume and recognises the end.
func (x *reader) entry(h *tar.Header, r io.Reader) (skip bool, err error) {
	if x.ended {
		return false, fault.New(fault.Invalid, "cannot restore: entries follow the end of the archive")
	}
	if h.Name == endEntry {
		x.src.settle(x.pad)
		x.src.direct = math.MaxInt64 // no longer of interest
		sum, n := hex.EncodeToString(x.src.sum.Sum(nil)), x.src.n
		if h.Size > maxJSON {
			return false, damaged(errors.New("its end is too long"))
		}
		var b bytes.Buffer
		if _, err := io.Copy(&b, r); err != nil {
			return false, damaged(err)
		}
		if err := json.Unmarshal(b.Bytes(), &x.end); err != nil {
			return false, damaged(err)
		}
		if x.end.SHA256 != sum || x.end.Bytes != n {
			return false, fault.New(fault.Invalid, "cannot restore: the archive is damaged: its content does not have the checksum that it says")
		}
		x.ended = true
		return true, nil
	}
	x.src.settle(-1)
	size := h.Size
	switch h.Typeflag {
	case tar.TypeReg:
	case tar.TypeDir, tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		size = 0
	default:
		return false, fault.New(fault.Invalid, "cannot restore: the archive holds an entry that backup does not make: %q", h.Name)
	}
	x.pad, x.src.direct = int(padding(size)), size
	name, ok := place(h.Name)
	if !ok {
		return false, fault.New(fault.Invalid, "cannot restore: %q lies outside of the volume", h.Name)
	}
	h.Name = name
	if h.Typeflag == tar.TypeLink {
		if h.Linkname, ok = place(h.Linkname); !ok {
			return false, fault.New(fault.Invalid, "cannot restore: a link leads outside of the volume")
		}
	}
	return false, nil
}

// place turns an entry's name into one inside of the volume.
func place(name string) (string, bool) {
	if name == dataEntry || name == dataEntry+"/" {
		return ".", true
	}
	return strings.CutPrefix(name, dataEntry+"/")
}
