package shim

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const recordVersion = 1

type record struct {
	Version int    `json:"version"`
	PID     int    `json:"pid"`
	Status  uint32 `json:"status"`
	Started int64  `json:"started"`
	Exited  int64  `json:"exited"`
	Dropped uint64 `json:"dropped"`
}

// ReadRecord reads the exit record that a monitor left in dir.
func ReadRecord(dir string) (e Exit, started time.Time, err error) {
	f, err := os.Open(filepath.Join(dir, "exit"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fault.As(fault.NotFound, err)
		}
		return e, started, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return e, started, err
	}
	return parseRecord(b)
}

func parseRecord(b []byte) (e Exit, started time.Time, err error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return e, started, fault.New(fault.Internal, "cannot read the exit record: %w", err)
	}
	if r.Version != recordVersion {
		return e, started, fault.New(fault.Unsupported, "cannot read the exit record: version %d is unknown", r.Version)
	}
	return Exit{Status: syscall.WaitStatus(r.Status), At: r.Exited, Dropped: r.Dropped}, time.Unix(0, r.Started), nil
}
