package install

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/upgrade"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// Job is one installation.
type Job struct {
	Disk     Disk
	Manifest *release.Manifest
	// Sealed is the manifest's envelope; the caller has verified it.
	Sealed []byte
	Parts  upgrade.Parts
	// Files are put on the data partition: path below it to content.
	Files map[string][]byte
	// Encrypt makes the data partition, which is empty, an encrypted one, and returns what to
	// mount; nil leaves the data readable.
	Encrypt func(ctx context.Context, dev data.Device) (data.Device, error)
	// Boot mounts the boot partition; its device is set here.
	Boot *upgrade.Boot
	// DataAt is where the data partition is mounted meanwhile.
	DataAt   string
	Progress func(step, part string, bytes, total int64)
}

// Identity is that of the disk after an installation with a document and a release: so one that
// was done already is known.
func Identity(document []byte, m *release.Manifest, d Disk) (g gpt.GUID) {
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%s%s\n%s\n%s\n", len(document), document, m.Part(release.Root).SHA256, d.Path, d.Serial)
	copy(g[:], h.Sum(nil))
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

// Write installs. Until the very end the disk cannot be started from, and says that an
// installation was cut off: the next one may take it.
func (j *Job) Write(ctx context.Context, id gpt.GUID) error {
	if err := j.write(ctx, id); err != nil {
		return fmt.Errorf("cannot install on %s: %w", j.Disk.Path, err)
	}
	return nil
}

func (j *Job) write(ctx context.Context, id gpt.GUID) error {
	if j.Manifest.Part(release.ESP) == nil {
		return fault.New(fault.Invalid, "the release has no boot loaders")
	}
	// Nothing but this disk has these partitions: by the boot partition's identity a system knows its disk.
	table, _ := slots.Layout(id, func(string) gpt.GUID { return gpt.NewGUID() })
	sectors := j.Disk.Size / gpt.Sector
	table.Grow(slots.DataPartition, sectors)
	f, err := j.claim(sectors)
	if err != nil {
		return err
	}
	defer f.Close()
	devices, err := j.partitions(ctx, f, table)
	if err != nil {
		return err
	}
	loader, err := j.loaders(ctx, devices[slots.ESPPartition])
	if err != nil {
		return err
	}
	j.Boot.Device = devices[slots.ESPPartition]
	t := upgrade.Target{Boot: j.Boot, Slot: "a", Root: devices[slots.Partition("a")], WithoutLoaders: true, Progress: j.Progress}
	if err := t.Write(ctx, j.Manifest, j.Sealed, j.Parts); err != nil {
		return err
	}
	if err := j.keep(ctx, devices[slots.DataPartition]); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return finish(f, table, sectors, loader)
}

// claim makes the disk one that holds an unfinished installation and nothing else.
func (j *Job) claim(sectors uint64) (*os.File, error) {
	// Nobody else has it, and nothing of it is mounted.
	alone, err := os.OpenFile(j.Disk.Path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return nil, err
	}
	first := make([]byte, sample)
	copy(first[gpt.Sector:], marker)
	w := synced{alone}
	_, err = w.WriteAt(first, 0)
	if err == nil {
		_, err = w.WriteAt(make([]byte, sample), int64(sectors*gpt.Sector-sample))
	}
	if err == nil {
		if err = unix.IoctlSetInt(int(alone.Fd()), unix.BLKRRPART, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("cannot have the kernel forget its partitions: %w", err)
		} else {
			err = nil
		}
	}
	if cerr := alone.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, err
	}
	return os.OpenFile(j.Disk.Path, os.O_RDWR, 0)
}

// partitions tells the kernel of the partitions, which the disk does not yet, and
// empties them.
func (j *Job) partitions(ctx context.Context, f *os.File, t *gpt.Table) (map[string]string, error) {
	out := map[string]string{}
	for i, p := range t.Partitions {
		number := i + 1
		part := unix.BlkpgPartition{Start: int64(p.First * gpt.Sector), Length: int64((p.Last - p.First + 1) * gpt.Sector), Pno: int32(number)}
		arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
		if _, _, no := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); no != 0 {
			return nil, fmt.Errorf("cannot add partition %d: %w", number, no)
		}
		// "sda" has "sda1", "nvme0n1" has "nvme0n1p1".
		dev := j.Disk.Path
		if last := dev[len(dev)-1]; last >= '0' && last <= '9' {
			dev += "p"
		}
		dev += fmt.Sprint(number)
		out[p.Name] = dev
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if _, err := os.Stat(dev); err == nil {
				break
			}
			if time.Now().After(end) || ctx.Err() != nil {
				return nil, fmt.Errorf("the partition %s does not come", dev)
			}
		}
	}
	return out, nil
}

// loaders writes the boot partition with its loaders, and returns what a BIOS starts.
func (j *Job) loaders(ctx context.Context, dev string) (bios []byte, err error) {
	buf := make([]byte, release.ChunkSize)
	var base []byte
	for i := range j.Manifest.Parts {
		p := &j.Manifest.Parts[i]
		if !p.Use.Loader() {
			break // loaders come first
		}
		r, err := j.Parts.Open(p)
		if err != nil {
			return nil, err
		}
		switch p.Use {
		case release.BIOS:
			err = p.Copy(r, buf, func(piece []byte, _ int64) error { bios = append(bios, piece...); return nil })
		case release.Base:
			err = p.Copy(r, buf, func(piece []byte, _ int64) error { base = append(base, piece...); return nil })
		case release.ESP:
			err = unpack(ctx, p, r, buf, base, dev)
		}
		r.Close()
		if err != nil {
			return nil, fmt.Errorf("cannot write the release's %s: %w", p.Name, err)
		}
	}
	if bios != nil && (len(bios) <= gpt.Sector || len(bios) > gpt.Sector+slots.BIOSSize<<20) {
		return nil, fault.New(fault.Invalid, "the boot loader for BIOS has %d bytes", len(bios))
	}
	return bios, nil
}

// unpack writes a part that was packed against base, if there is one, to a device that it makes all
// zeros before. The unpacking reads pieces that were verified.
func unpack(ctx context.Context, p *release.Part, r io.Reader, buf, base []byte, dev string) error {
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := data.Device{Path: dev}.Size()
	if err != nil {
		return err
	}
	span := [2]uint64{0, size}
	if _, _, no := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x127f /* BLKZEROOUT */, uintptr(unsafe.Pointer(&span))); no != 0 {
		return fmt.Errorf("cannot write zeros: %w", no)
	}
	pr, pw := io.Pipe()
	copied := make(chan error, 1)
	go func() {
		err := p.Copy(r, buf, func(piece []byte, _ int64) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			_, err := pw.Write(piece)
			return err
		})
		pw.CloseWithError(err)
		copied <- err
	}()
	err = spread(f, pr, base, int64(size))
	pr.CloseWithError(errors.Join(err, io.ErrClosedPipe))
	if cerr := <-copied; cerr != nil && !errors.Is(cerr, io.ErrClosedPipe) {
		err = cerr // the cause of what the unpacking saw
	}
	if err != nil {
		return err
	}
	return f.Sync()
}

// spread writes what is not zero of a packed stream.
func spread(f *os.File, r io.Reader, base []byte, limit int64) error {
	options := []zstd.DOption{zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8 << 20)}
	if base != nil {
		options = append(options, zstd.WithDecoderDictRaw(release.BaseID, base))
	}
	z, err := zstd.NewReader(r, options...)
	if err != nil {
		return err
	}
	defer z.Close()
	b := make([]byte, probe)
	for at := int64(0); ; {
		n, err := io.ReadFull(z, b)
		if at+int64(n) > limit {
			return fault.New(fault.Invalid, "it is larger than its partition")
		}
		if n > 0 && !zero(b[:n]) {
			if _, werr := f.WriteAt(b[:n], at); werr != nil {
				return werr
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) && n > 0 {
			// A stream that was cut off says so at its next read.
			if _, err := z.Read(b[:1]); !errors.Is(err, io.EOF) {
				return fmt.Errorf("cannot unpack: %w", err)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot unpack: %w", err)
		}
	}
}

// keep makes the file system for what is kept, with the files.
func (j *Job) keep(ctx context.Context, dev string) (err error) {
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	_, err = synced{f}.WriteAt(make([]byte, sample), 0)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(j.DataAt, 0o700); err != nil {
		return err
	}
	on := data.Device{Path: dev}
	if j.Encrypt != nil {
		if on, err = j.Encrypt(ctx, on); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, on.Close()) }()
	}
	if err := on.Mount(j.DataAt); err != nil {
		return err
	}
	err = j.files()
	if uerr := unix.Unmount(j.DataAt, 0); err == nil && uerr != nil {
		err = fmt.Errorf("cannot unmount the data: %w", uerr)
	}
	return err
}

func (j *Job) files() error {
	for name, b := range j.Files {
		if !fs.ValidPath(name) {
			return fmt.Errorf("%q is no path", name)
		}
		p := filepath.Join(j.DataAt, name)
		for at := 0; at < len(name); at++ {
			if name[at] != '/' {
				continue
			}
			perm := os.FileMode(0o755)
			if strings.HasSuffix(name[:at], "/cloudos") {
				perm = 0o700
			}
			if err := os.Mkdir(filepath.Join(j.DataAt, name[:at]), perm); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		if err == nil {
			err = f.Sync()
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	}
	d, err := os.Open(j.DataAt)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

// finish makes the disk one to start from: the table's end, which firmware looks at
// first, is written last.
func finish(f *os.File, t *gpt.Table, sectors uint64, bios []byte) error {
	w := synced{f}
	if bios != nil {
		if _, err := w.WriteAt(bios[gpt.Sector:], int64(t.Partitions[0].First*gpt.Sector)); err != nil {
			return err
		}
		if _, err := w.WriteAt(bios[:440], 0); err != nil {
			return err
		}
	}
	if err := t.Write(w, sectors); err != nil {
		return fmt.Errorf("cannot write the partition table: %w", err)
	}
	return nil
}

// synced has each write on the disk before the next.
type synced struct{ f *os.File }

func (s synced) WriteAt(b []byte, at int64) (int, error) {
	n, err := s.f.WriteAt(b, at)
	if err == nil {
		err = s.f.Sync()
	}
	return n, err
}
