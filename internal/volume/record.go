package volume

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// stored is the record of a volume.
type stored struct {
	Version   int
	Name      string
	Created   time.Time
	Labels    map[string]string `json:",omitempty"`
	Options   map[string]string `json:",omitempty"`
	Ephemeral bool              `json:",omitempty"`
	// Driver is the plugin that keeps the volume, "" for ourselves.
	Driver string `json:",omitempty"`
	// Project is the id that the file system counts its size by, 0 for none.
	Project uint32 `json:",omitempty"`
}

// mounts tells whether the volume's data is mounted from elsewhere by us.
func (r stored) mounts() bool {
	return r.Driver == "" && (r.Options["type"] != "" || r.Options["device"] != "")
}

// driver is the name that is shown.
func (r stored) driver() string {
	if r.Driver == "" {
		return Driver
	}
	return r.Driver
}

const maxRecord = 1 << 20

// beneath opens a path of ours: no link is followed and no mount left.
func beneath(dir int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (s *Store) openData(name string) (*os.File, error) {
	f, err := beneath(int(s.dir.Fd()), name+"/"+dataDir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open volume %s: %w", name, err)
	}
	return f, nil
}

// Open opens a volume's data directory. One that is mounted from elsewhere must
// be in use.
func (s *Store) Open(name string) (*os.File, error) {
	v, err := s.get(name)
	if err != nil {
		return nil, err
	}
	if v.rec.Driver == "" {
		return s.openData(name)
	}
	v.mu.Lock()
	at := v.at
	v.mu.Unlock()
	if at == "" {
		return nil, fault.New(fault.Conflict, "cannot open volume %s: nobody uses it", name)
	}
	return openMountpoint(name, at)
}

func (s *Store) readRecord(name string) (stored, error) {
	var r stored
	f, err := beneath(int(s.dir.Fd()), name+"/"+record, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return r, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return r, err
	}
	if len(b) > maxRecord {
		return r, errors.New("record is too large")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(&r); err != nil {
		return r, err
	}
	if r.Version != 1 || r.Name != name {
		return r, fmt.Errorf("record is of version %d and volume %q", r.Version, r.Name)
	}
	return r, nil
}

// prepare makes a volume under a temporary name, complete and synced.
func (s *Store) prepare(r stored) (tmp string, err error) {
	fail := func(err error) (string, error) {
		if tmp != "" {
			_ = s.discard(tmp)
		}
		return "", fault.New(fault.Of(err), "cannot create volume %s: %w", r.Name, err)
	}
	r.Version = 1
	b, err := json.Marshal(r)
	if err != nil {
		return fail(err)
	}
	if len(b) > maxRecord {
		return "", invalid("cannot create volume %s: its labels and options are larger than %d bytes", r.Name, maxRecord)
	}
	root := int(s.dir.Fd())
	name := newPrefix + randomName()
	if err := unix.Mkdirat(root, name, 0o701); err != nil {
		return fail(err)
	}
	tmp = name
	dir, err := beneath(root, tmp, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fail(err)
	}
	defer dir.Close()
	if err := unix.Mkdirat(int(dir.Fd()), dataDir, 0o755); err != nil {
		return fail(err)
	}
	// The umask of whoever started the engine is not the volume's business.
	if err := unix.Fchmodat(int(dir.Fd()), dataDir, 0o755, 0); err != nil {
		return fail(err)
	}
	if r.Project != 0 {
		data, err := beneath(int(dir.Fd()), dataDir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return fail(err)
		}
		err = s.limit(data, r)
		data.Close()
		if err != nil {
			return fail(err)
		}
	}
	fd, err := unix.Openat(int(dir.Fd()), record, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), record)
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fail(err)
	}
	if !r.Ephemeral {
		if err := errors.Join(f.Sync(), dir.Sync()); err != nil {
			return fail(err)
		}
	}
	return tmp, nil
}
