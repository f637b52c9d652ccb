package checkpoint

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Writer writes a checkpoint as a tar, part by part as they come to be.
type Writer struct {
	tw    *tar.Writer
	at    time.Time
	parts []Part
}

// NewWriter makes one; the manifest goes first.
func NewWriter(w io.Writer, m *Manifest) (*Writer, error) {
	x := &Writer{tw: tar.NewWriter(w), at: m.Created}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	return x, x.Put(ManifestName, int64(len(b)), bytes.NewReader(b))
}

// Put writes one part of a known size.
func (x *Writer) Put(name string, size int64, r io.Reader) error {
	if err := x.header(name, size); err != nil {
		return err
	}
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(x.tw, sum), io.LimitReader(r, size+1))
	if err == nil && n != size {
		err = fmt.Errorf("%s changed while it was read", name)
	}
	if err != nil {
		return err
	}
	x.parts = append(x.parts, Part{name, size, hex.EncodeToString(sum.Sum(nil))})
	return nil
}

func (x *Writer) header(name string, size int64) error {
	return x.tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: size, ModTime: x.at, Format: tar.FormatPAX})
}

// PutDir writes the plain files of a directory below dir, by name.
func (x *Writer) PutDir(dir *os.File, name string) error {
	d, err := openBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	list, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	slices.SortFunc(list, func(a, b os.DirEntry) int { return bytes.Compare([]byte(a.Name()), []byte(b.Name())) })
	for _, e := range list {
		if !e.Type().IsRegular() {
			continue // CRIU's link to the round before is made again
		}
		if err := x.PutFile(dir, name+"/"+e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// PutFile writes a file below dir.
func (x *Writer) PutFile(dir *os.File, name string) error {
	f, err := openBeneath(dir, name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return x.Put(name, st.Size(), f)
}

// Final writes the manifest as it has come to be.
func (x *Writer) Final(m *Manifest) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return x.Put(FinalName, int64(len(b)), bytes.NewReader(b))
}

// Close seals the checkpoint.
func (x *Writer) Close() error {
	b, err := json.Marshal(seal{Version, x.parts})
	if err != nil {
		return err
	}
	if err := x.header(SealName, int64(len(b))); err != nil {
		return err
	}
	if _, err := x.tw.Write(b); err != nil {
		return err
	}
	return x.tw.Close()
}

// openBeneath opens a file of a checkpoint's directory, through no link.
func openBeneath(dir *os.File, name string, flags, mode int) (*os.File, error) {
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), Mode: uint64(mode),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// ReadOptions bound what is read.
type ReadOptions struct {
	// MaxBytes is how much may be written to the disk; 0 is no bound.
	MaxBytes int64
	// Manifest, if set, is shown the manifest before anything is written, and may
	// refuse it.
	Manifest func(*Manifest) error
}

// Read unpacks a checkpoint into an empty directory, and returns once its seal was
// found to fit and all is on the disk. Until then nothing of it is to be used.
func Read(ctx context.Context, r io.Reader, dir *os.File, o ReadOptions) (*Manifest, error) {
	tr := tar.NewReader(r)
	b, err := whole(tr, ManifestName, maxManifest)
	if err != nil {
		return nil, err
	}
	m, err := ParseManifest(b)
	if err != nil {
		return nil, err
	}
	if o.Manifest != nil {
		if err := o.Manifest(m); err != nil {
			return nil, err
		}
	}
	x := &reader{dir: dir, m: m, left: o.MaxBytes, bounded: o.MaxBytes > 0, seen: map[string]bool{}}
	if err := x.store(ManifestName, int64(len(b)), bytes.NewReader(b)); err != nil {
		return nil, err
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if err != nil {
			return nil, damaged(err)
		}
		if h.Typeflag != tar.TypeReg {
			return nil, fault.New(fault.Invalid, "cannot read the checkpoint: %.128q is no plain file", h.Name)
		}
		if h.Name == SealName {
			return m, x.close(tr, h)
		}
		if h.Name == FinalName {
			if err := x.final(tr, h); err != nil {
				return nil, err
			}
			m = x.m
			continue
		}
		if err := x.store(h.Name, h.Size, tr); err != nil {
			return nil, err
		}
	}
}

// final takes the second manifest in, which must be of the same container.
func (x *reader) final(tr *tar.Reader, h *tar.Header) error {
	if h.Size > maxManifest || x.seen[FinalName] {
		return fault.New(fault.Invalid, "cannot read the checkpoint: its second manifest is too long, or there are two")
	}
	b := make([]byte, h.Size)
	if _, err := io.ReadFull(tr, b); err != nil {
		return damaged(err)
	}
	m, err := ParseManifest(b)
	if err != nil {
		return err
	}
	was, err := json.Marshal(x.m.Container)
	if err != nil {
		return err
	}
	is, err := json.Marshal(m.Container)
	if err != nil {
		return err
	}
	if !bytes.Equal(was, is) || m.Rounds > x.m.Rounds || m.Cold != x.m.Cold || m.Stopped != x.m.Stopped || m.WithImage != x.m.WithImage || !slices.Equal(m.Volumes, x.m.Volumes) {
		return fault.New(fault.Invalid, "cannot read the checkpoint: its manifests contradict each other")
	}
	if err := x.store(FinalName, int64(len(b)), bytes.NewReader(b)); err != nil {
		return err
	}
	x.m = m
	return nil
}

func damaged(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("it is cut off: its seal is missing")
	}
	return fault.New(fault.Invalid, "cannot read the checkpoint: %w", err)
}

// whole reads an entry that must come next.
func whole(tr *tar.Reader, name string, limit int64) ([]byte, error) {
	h, err := tr.Next()
	if errors.Is(err, io.EOF) || err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint: this is none: %w", err)
	}
	if h.Name != name || h.Typeflag != tar.TypeReg || h.Size > limit {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint: this is none: it begins with %.64q, not %s", h.Name, name)
	}
	b := make([]byte, h.Size)
	if _, err := io.ReadFull(tr, b); err != nil {
		return nil, damaged(err)
	}
	return b, nil
}

type reader struct {
	dir     *os.File
	m       *Manifest
	left    int64
	bounded bool
	seen    map[string]bool
	parts   []Part
}

// store writes one part.
func (x *reader) store(name string, size int64, r io.Reader) error {
	switch {
	case name != ManifestName && name != FinalName && (x.seen[FinalName] || !x.m.partOf(name)):
		return fault.New(fault.Invalid, "cannot read the checkpoint: %.128q is no part of it", name)
	case x.seen[name]:
		return fault.New(fault.Invalid, "cannot read the checkpoint: %s comes twice", name)
	case len(x.seen) >= maxFiles:
		return fault.New(fault.Invalid, "cannot read the checkpoint: it has more than %d files", maxFiles)
	case x.bounded && size > x.left:
		return fault.New(fault.Exhausted, "cannot read the checkpoint: it needs more room than there is")
	}
	x.left -= size
	x.seen[name] = true
	if d := path.Dir(name); d != "." {
		if err := mkdirs(x.dir, d); err != nil {
			return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
		}
	}
	f, err := openBeneath(x.dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	defer f.Close()
	sum := sha256.New()
	out := &failing{w: f}
	n, err := io.Copy(io.MultiWriter(out, sum), r)
	if out.err != nil {
		return fault.New(fault.Exhausted, "cannot store the checkpoint: %w", out.err)
	}
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return damaged(err)
	}
	if err := f.Sync(); err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	x.parts = append(x.parts, Part{name, size, hex.EncodeToString(sum.Sum(nil))})
	return nil
}

// failing remembers that it was the disk, not the stream.
type failing struct {
	w   io.Writer
	err error
}

func (f *failing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err != nil {
		f.err = err
	}
	return n, err
}

func mkdirs(dir *os.File, name string) error {
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			continue
		}
		if err := unix.Mkdirat(int(dir.Fd()), name[:i], 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return &os.PathError{Op: "mkdir", Path: name[:i], Err: err}
		}
	}
	return nil
}

// close compares the seal with what came, and makes the rounds refer to each other
// as CRIU wants it.
func (x *reader) close(tr *tar.Reader, h *tar.Header) error {
	if h.Size > maxSeal {
		return fault.New(fault.Invalid, "cannot read the checkpoint: its seal is too long")
	}
	b := make([]byte, h.Size)
	if _, err := io.ReadFull(tr, b); err != nil {
		return damaged(err)
	}
	s, err := parseSeal(b)
	if err != nil {
		return err
	}
	if !slices.Equal(s.Parts, x.parts) {
		return fault.New(fault.Invalid, "cannot read the checkpoint: it is damaged, or was put together from others: its seal does not fit")
	}
	if _, err := tr.Next(); !errors.Is(err, io.EOF) {
		return fault.New(fault.Invalid, "cannot read the checkpoint: something follows its seal")
	}
	want := []string{LayerName}
	if x.m.WithImage {
		want = append(want, ImageName)
	}
	for i := range x.m.Volumes {
		want = append(want, VolumeName(i+1))
	}
	for _, name := range want {
		if !x.seen[name] {
			return fault.New(fault.Invalid, "cannot read the checkpoint: it lacks %s", name)
		}
	}
	for n := 1; n <= x.m.Rounds; n++ {
		if !slices.ContainsFunc(x.parts, func(p Part) bool { return path.Dir(p.Name) == RoundDir(n) }) {
			return fault.New(fault.Invalid, "cannot read the checkpoint: round %d of its images is missing", n)
		}
	}
	if err := Link(x.dir, x.m.Rounds); err != nil {
		return err
	}
	f, err := openBeneath(x.dir, SealName, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Sync(), f.Close(), x.dir.Sync())
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	return nil
}

// Link makes each round's directory name the one before, whose memory it builds on.
func Link(dir *os.File, rounds int) error {
	for n := 2; n <= rounds; n++ {
		err := unix.Symlinkat(fmt.Sprintf("../%d", n-1), int(dir.Fd()), RoundDir(n)+"/"+parentName)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
		}
	}
	return nil
}

// Load reads the manifest of a directory that was sealed.
func Load(dir *os.File) (*Manifest, error) {
	st, err := openBeneath(dir, SealName, unix.O_PATH, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, fault.New(fault.Invalid, "cannot use the checkpoint: it is not whole")
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the checkpoint: %w", err)
	}
	st.Close()
	f, err := openBeneath(dir, FinalName, unix.O_RDONLY, 0)
	if errors.Is(err, unix.ENOENT) {
		f, err = openBeneath(dir, ManifestName, unix.O_RDONLY, 0)
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the checkpoint: %w", err)
	}
	return ParseManifest(b)
}

// Store writes the manifest into a directory and seals what lies there: a
// checkpoint that stays on its engine. The parts' digests are taken when it leaves.
func Store(dir *os.File, m *Manifest) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	s, err := json.Marshal(seal{Version, []Part{{Name: ManifestName, Size: int64(len(b))}}})
	if err != nil {
		return err
	}
	for _, x := range []struct {
		name string
		data []byte
	}{{ManifestName, b}, {SealName, s}} {
		f, err := openBeneath(dir, x.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
		if err == nil {
			_, err = f.Write(x.data)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err != nil {
			return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
		}
	}
	if err := dir.Sync(); err != nil {
		return fault.New(fault.Internal, "cannot store the checkpoint: %w", err)
	}
	return nil
}

// Open opens a part of a checkpoint's directory.
func Open(dir *os.File, name string) (*os.File, error) {
	f, err := openBeneath(dir, name, unix.O_RDONLY, 0)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the checkpoint: %w", err)
	}
	return f, nil
}

// Create makes a part of a checkpoint's directory.
func Create(dir *os.File, name string) (*os.File, error) {
	if d := path.Dir(name); d != "." {
		if err := mkdirs(dir, d); err != nil {
			return nil, err
		}
	}
	return openBeneath(dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
}

// MakeRound makes the directory of a round and opens it.
func MakeRound(dir *os.File, n int) (*os.File, error) {
	if err := mkdirs(dir, RoundDir(n)); err != nil {
		return nil, err
	}
	return OpenRound(dir, n)
}

// OpenRound opens the directory of a round.
func OpenRound(dir *os.File, n int) (*os.File, error) {
	return openBeneath(dir, RoundDir(n), unix.O_RDONLY|unix.O_DIRECTORY, 0)
}
