package osinit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// log keeps the last lines in memory and shows them on the console.
type log struct {
	prefix string
	limit  int

	mu      sync.Mutex
	lines   [][]byte
	size    int
	total   int // lines ever
	more    chan struct{}
	console io.Writer
}

func newLog(prefix string, limit int) *log {
	return &log{prefix: prefix, limit: limit, more: make(chan struct{})}
}

// Printf adds a line.
func (l *log) Printf(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	for line := range strings.Lines(text) {
		l.add([]byte(fmt.Sprintf("%8.3f %s\n", uptime(), strings.TrimRight(line, "\n"))))
	}
}

func (l *log) add(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	l.size += len(line)
	l.total++
	for l.size > l.limit && len(l.lines) > 1 {
		l.size -= len(l.lines[0])
		l.lines = l.lines[1:]
	}
	close(l.more)
	l.more = make(chan struct{})
	if l.console != nil {
		l.console.Write(append([]byte(l.prefix), line...))
	}
}

// fill adds what comes over r, line by line.
func (l *log) fill(r io.Reader) {
	b, kept := make([]byte, 16<<10), []byte(nil)
	for {
		n, err := r.Read(b)
		kept = append(kept, b[:n]...)
		for {
			i := bytes.IndexByte(kept, '\n')
			if i < 0 && len(kept) >= len(b) {
				i = len(kept) - 1
			}
			if i < 0 {
				break
			}
			l.add(bytes.Clone(kept[:i+1]))
			kept = kept[i+1:]
		}
		if err != nil {
			if len(kept) > 0 {
				l.add(append(kept, '\n'))
			}
			return
		}
	}
}

// write writes the last lines, and those to come.
func (l *log) write(ctx context.Context, w io.Writer, tail int, follow bool) error {
	l.mu.Lock()
	next := max(l.total-min(tail, len(l.lines)), 0)
	l.mu.Unlock()
	for {
		l.mu.Lock()
		first := l.total - len(l.lines)
		next = max(next, first)
		out := bytes.Join(l.lines[next-first:], nil)
		next = l.total
		more := l.more
		l.mu.Unlock()
		if len(out) > 0 {
			if _, err := w.Write(out); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil
		}
	}
}

// kernelLog writes the kernel's messages.
func kernelLog(ctx context.Context, w io.Writer, tail int, follow bool) error {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "kmsg")
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	b := make([]byte, 16<<10)
	var lines []string
	for {
		n, err := unix.Read(fd, b)
		if err == unix.EPIPE {
			continue // overwritten before it was read
		}
		if err != nil {
			break // all that there is
		}
		lines = append(lines, kernelLine(b[:n]))
	}
	if tail < len(lines) {
		lines = lines[len(lines)-tail:]
	}
	if _, err := io.WriteString(w, strings.Join(lines, "")); err != nil || !follow {
		return err
	}
	for {
		n, err := f.Read(b)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if pe, ok := err.(*os.PathError); ok && pe.Err == unix.EPIPE {
				continue
			}
			return err
		}
		if _, err := io.WriteString(w, kernelLine(b[:n])); err != nil {
			return err
		}
	}
}

// kernelLine turns a record of /dev/kmsg, "PRIORITY,SEQUENCE,MICROSECONDS,…;TEXT",
// into a line.
func kernelLine(rec []byte) string {
	head, text, _ := strings.Cut(string(rec), ";")
	text, _, _ = strings.Cut(text, "\n")
	var micros uint64
	if f := strings.Split(head, ","); len(f) > 2 {
		fmt.Sscan(f[2], &micros)
	}
	return fmt.Sprintf("%8.3f %s\n", float64(micros)/1e6, text)
}

// uptime is the time since the kernel began, in seconds.
func uptime() float64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return float64(ts.Sec) + float64(ts.Nsec)/1e9
}
