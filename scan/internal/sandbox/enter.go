package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Inside is what a stage has.
type Inside struct {
	// Scratch is a directory to write to; Database the file that was given, in a
	// directory of its own.
	Scratch, Database string
	disk              atomic.Int64
}

// Enter confines this process. A stage calls it before it reads its input.
func Enter() (*Inside, error) {
	memory, err1 := strconv.ParseInt(os.Getenv(envMemory), 10, 64)
	disk, err2 := strconv.ParseInt(os.Getenv(envDisk), 10, 64)
	if err := errors.Join(err1, err2); err != nil || memory <= 0 || disk <= 0 {
		return nil, fmt.Errorf("cannot read the limits of a stage: %w", err)
	}
	in := &Inside{Scratch: os.Getenv(envScratch), Database: os.Getenv(envDatabase)}
	if in.Scratch == "" {
		return nil, errors.New("a stage is run by servin-scan, not by hand")
	}
	in.disk.Store(disk)
	debug.SetMaxThreads(500)
	if os.Getenv(envMode) == modeFull {
		if err := enterRoot(in); err != nil {
			return nil, err
		}
	}
	if err := limit(memory, disk, os.Getenv(envMode) == modeFull); err != nil {
		return nil, err
	}
	for k, v := range map[string]string{"TMPDIR": in.Scratch, "TMP": in.Scratch, "HOME": in.Scratch, "XDG_CACHE_HOME": in.Scratch} {
		if err := os.Setenv(k, v); err != nil {
			return nil, err
		}
	}
	go watch(memory)
	return in, nil
}

// watch ends the process when it takes more memory than it may, with an exit code
// that says so: the system's own limit lies a little higher and would end it
// without a word.
func watch(most int64) {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	for range time.Tick(10 * time.Millisecond) {
		metrics.Read(s)
		if int64(s[0].Value.Uint64()-s[1].Value.Uint64()) > most {
			os.Exit(exitMemory)
		}
	}
}

// ErrDisk is that the scratch space is used up.
var ErrDisk = fault.New(fault.Exhausted, "the content unpacks to more than the scan may take")

// Take counts bytes that are written to the scratch directory.
func (in *Inside) Take(n int64) error {
	if in.disk.Add(-n) < 0 {
		return ErrDisk
	}
	return nil
}

// Exit ends a stage with what its error means.
func Exit(err error) {
	switch {
	case err == nil:
		os.Exit(0)
	case errors.Is(err, ErrYes):
		os.Exit(exitYes)
	case errors.Is(err, ErrDisk) || fileTooLarge(err):
		os.Exit(exitDisk)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(exitFailed)
}
