// Package upgrade writes systems into slots and decides which one starts: the boot
// partition with a folder for each slot and the boot loader's block of variables (package
// slots), and a partition for each slot's root. At any instant the running slot is whole and
// starts; another one is started only after all of it was written and read back. The first
// process and package install import it.
package upgrade

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/slots"
)

const sealedFile = slots.SealedFile

// Boot is the boot partition. It is mounted while it is used, and not otherwise.
type Boot struct {
	// Device is the partition; where it is empty, Find says which.
	Device string
	Find   func() (string, error)
	// Prepare loads what mounting needs.
	Prepare func() error

	mu sync.Mutex
}

// With mounts the partition and calls fn with a path to it, which is good until fn returns.
func (b *Boot) With(write bool, fn func(dir string) error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.with(write, fn)
}

func (b *Boot) device() (string, error) {
	if b.Device != "" {
		return b.Device, nil
	}
	return b.Find()
}

func (b *Boot) with(write bool, fn func(dir string) error) error {
	dev, err := b.device()
	if err != nil {
		return err
	}
	if b.Prepare != nil {
		if err := b.Prepare(); err != nil {
			return err
		}
	}
	at, err := detached(dev, write)
	if err != nil {
		return fmt.Errorf("cannot mount the boot partition %s: %w", dev, err)
	}
	defer at.Close()
	dir := fmt.Sprintf("/proc/self/fd/%d", at.Fd())
	if err := fn(dir); err != nil || !write {
		return err
	}
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return unix.Syncfs(int(root.Fd()))
}

// detached mounts a device nowhere: it is reached through the descriptor alone, and gone with
// it. A mount with a place would be copied into each container's namespace that is made
// meanwhile, and stay for as long as that does.
func detached(dev string, write bool) (*os.File, error) {
	fs, err := unix.Fsopen("vfat", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fs)
	err = errors.Join(unix.FsconfigSetString(fs, "source", dev), unix.FsconfigSetString(fs, "umask", "077"))
	if err == nil && !write {
		err = unix.FsconfigSetFlag(fs, "ro")
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return nil, err
	}
	attr := unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOATIME
	if !write {
		attr |= unix.MOUNT_ATTR_RDONLY
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "the boot partition"), nil
}

// State reads the boot loader's block.
func State(dir string) (slots.State, error) {
	b, err := os.ReadFile(filepath.Join(dir, slots.BlockFile))
	if err != nil {
		return slots.State{}, err
	}
	return slots.Parse(b)
}

// SetState writes the boot loader's block: in place, since the boot loader knows the
// file's blocks, and what changes is in one sector of it.
func SetState(dir string, s slots.State) error {
	b, err := s.Block()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, slots.BlockFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() != slots.Size {
		return fault.New(fault.Conflict, "the boot loader's block of variables is damaged (%d bytes, %v)", st.Size(), err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// Sealed reads the envelope of the system in a slot; nil is none.
func Sealed(dir, slot string) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, slots.Folder(slot), sealedFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, release.MaxEnvelope+1))
}

// Parts opens parts of a release, in their order; End is behind the last.
type Parts interface {
	Open(p *release.Part) (io.ReadCloser, error)
	End() error
}

// Target is where a system is written.
type Target struct {
	Boot *Boot
	// Slot is a or b, Root its partition's device.
	Slot, Root string
	// WithoutLoaders says that the parts that only an installation writes were taken already;
	// otherwise they are read over.
	WithoutLoaders bool
	// Progress is told how much of the release was written or read back; it may be nil.
	Progress func(step, part string, bytes, total int64)
}

// Write writes a system: first it makes the slot's system none, and last a whole one. m is
// the content of sealed, which the caller has verified.
func (t *Target) Write(ctx context.Context, m *release.Manifest, sealed []byte, parts Parts) error {
	dev, err := os.OpenFile(t.Root, os.O_RDWR|unix.O_EXCL, 0) // nobody has it mounted
	if err != nil {
		return fmt.Errorf("cannot open the slot: %w", err)
	}
	defer dev.Close()
	size, err := data.Device{Path: t.Root}.Size()
	if err != nil {
		return err
	}
	if root := m.Part(release.Root); uint64(root.Size) > size {
		return fault.New(fault.Exhausted, "the release's root has %d MiB, and the slot %d: install it anew on a disk with larger slots", root.Size>>20, size>>20)
	}
	t.Boot.mu.Lock()
	defer t.Boot.mu.Unlock()
	if err := t.Boot.sweep(slots.Folder(t.Slot)); err != nil {
		return err
	}
	return t.Boot.with(true, func(dir string) error {
		folder := filepath.Join(dir, slots.Folder(t.Slot))
		if err := empty(folder); err != nil {
			return err
		}
		if err := t.room(dir, m); err != nil {
			return err
		}
		if err := t.parts(ctx, m, parts, folder, dev); err != nil {
			return err
		}
		if err := t.readBack(ctx, m, folder, dev); err != nil {
			return err
		}
		return write(filepath.Join(folder, sealedFile), sealed)
	})
}

// empty removes what is in a slot's folder, the envelope first.
func empty(folder string) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(folder, sealedFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := durable.SyncDir(folder); err != nil {
		return err
	}
	list, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := os.RemoveAll(filepath.Join(folder, e.Name())); err != nil {
			return err
		}
	}
	return durable.SyncDir(folder)
}

func (t *Target) room(dir string, m *release.Manifest) error {
	need := int64(release.MaxEnvelope)
	for _, p := range m.Parts {
		if p.InFolder() || p.Use == release.Template {
			need += p.Size
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free < need {
		return fault.New(fault.Exhausted, "the boot partition has %d MiB free, and the release needs %d", free>>20, need>>20)
	}
	return nil
}

func (t *Target) progress(step, part string, n, total int64) {
	if t.Progress != nil {
		t.Progress(step, part, n, total)
	}
}

func (t *Target) parts(ctx context.Context, m *release.Manifest, parts Parts, folder string, dev *os.File) error {
	buf := make([]byte, release.ChunkSize)
	var done int64
	total := m.Size()
	for i := range m.Parts {
		p := &m.Parts[i]
		if p.Use.Loader() && t.WithoutLoaders {
			done += p.Size
			continue
		}
		r, err := parts.Open(p)
		if err != nil {
			return err
		}
		var file *os.File
		text := new(bytes.Buffer)
		if p.InFolder() {
			if file, err = os.OpenFile(filepath.Join(folder, p.Name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
				r.Close()
				return err
			}
		}
		err = p.Copy(r, buf, func(piece []byte, at int64) (err error) {
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case p.InFolder():
				_, err = file.Write(piece)
			case p.Use == release.Template:
				text.Write(piece)
			case p.Use == release.Root:
				_, err = dev.WriteAt(piece, at)
			}
			done += int64(len(piece))
			t.progress("write", p.Name, done, total)
			return err
		})
		r.Close()
		if file != nil {
			if serr := file.Sync(); err == nil {
				err = serr
			}
			if cerr := file.Close(); err == nil {
				err = cerr
			}
		}
		if err == nil && p.Use == release.Template {
			err = errors.Join(write(filepath.Join(folder, release.RawName(p.Name)), text.Bytes()), write(filepath.Join(folder, p.Name), release.Fill(text.String(), t.Slot)))
		}
		if err != nil {
			return fmt.Errorf("cannot write the release's %s: %w", p.Name, err)
		}
	}
	if err := parts.End(); err != nil {
		return err
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("cannot write the slot: %w", err)
	}
	return durable.SyncDir(folder)
}

// readBack reads everything from the disk again.
func (t *Target) readBack(ctx context.Context, m *release.Manifest, folder string, dev *os.File) error {
	// What the kernel remembers of the device is dropped: the disk is to be read. Without this, it is
	// at least compared with what was meant.
	_ = unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0)
	return check(ctx, m, t.Slot, folder, dev, func(part string, n, total int64) { t.progress("verify", part, n, total) })
}

// check compares a slot's system with its manifest.
func check(ctx context.Context, m *release.Manifest, slot, folder string, root io.ReaderAt, progress func(part string, n, total int64)) error {
	buf := make([]byte, release.ChunkSize)
	var done, total int64
	for _, p := range m.Parts {
		if !p.Use.Loader() {
			total += p.Size
		}
	}
	for i := range m.Parts {
		p := &m.Parts[i]
		var r io.Reader
		switch p.Use {
		case release.Root:
			r = io.NewSectionReader(root, 0, p.Size)
		case release.Boot, release.Unified:
			f, err := os.Open(filepath.Join(folder, p.Name))
			if err != nil {
				return err
			}
			defer f.Close()
			if raw, err := f.SyscallConn(); err == nil {
				_ = raw.Control(func(fd uintptr) { _ = unix.Fadvise(int(fd), 0, 0, unix.FADV_DONTNEED) })
			}
			r = f
		case release.Template:
			raw, err := os.ReadFile(filepath.Join(folder, release.RawName(p.Name)))
			if err != nil {
				return err
			}
			filled, err := os.ReadFile(filepath.Join(folder, p.Name))
			if err != nil {
				return err
			}
			if !bytes.Equal(filled, release.Fill(string(raw), slot)) {
				return fault.New(fault.Forbidden, "cannot use what is in slot %s: its %s is not what was signed", slot, p.Name)
			}
			r = bytes.NewReader(raw)
		default:
			continue
		}
		err := p.Copy(r, buf, func(piece []byte, _ int64) error {
			done += int64(len(piece))
			progress(p.Name, done, total)
			return ctx.Err()
		})
		if err != nil {
			return fmt.Errorf("cannot use what is in slot %s: %w", slot, err)
		}
	}
	return nil
}

// Check reads the whole system of a slot and compares it with its envelope.
func (b *Boot) Check(ctx context.Context, slot, root string, m *release.Manifest) error {
	f, err := os.Open(root)
	if err != nil {
		return fmt.Errorf("cannot open the slot: %w", err)
	}
	defer f.Close()
	return b.With(false, func(dir string) error {
		return check(ctx, m, slot, filepath.Join(dir, slots.Folder(slot)), f, func(string, int64, int64) {})
	})
}

func write(name string, b []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
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
	if err == nil {
		err = durable.SyncDir(filepath.Dir(name))
	}
	return err
}
