package host

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/vm"
)

// maxConsole bounds the console's file: there are this one and the one before it.
const maxConsole = 1 << 20

// console keeps what the machine says on its serial line, and lets one who looks
// type there.
type console struct {
	path string

	mu   sync.Mutex
	file *os.File
	size int64
	conn net.Conn
	see  map[chan []byte]bool
	tail []byte
}

func newConsole(path string) (*console, error) {
	c := &console{path: path, see: map[chan []byte]bool{}}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	c.file = f
	if fi, err := f.Stat(); err == nil {
		c.size = fi.Size()
	}
	return c, nil
}

// follow reads the machine's console until ctx ends, and tells each time that
// something came.
func (c *console) follow(ctx context.Context, m vm.Machine, came func()) {
	k, ok := m.(vm.Console)
	if !ok {
		return
	}
	c.mu.Lock()
	c.tail = nil
	c.mu.Unlock()
	for ctx.Err() == nil {
		conn, err := k.Console(ctx)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			c.mu.Lock()
			c.conn = conn
			c.mu.Unlock()
			buf := make([]byte, 16<<10)
			for {
				n, err := conn.Read(buf)
				if n > 0 {
					came()
					c.write(buf[:n])
				}
				if err != nil {
					break
				}
			}
			c.mu.Lock()
			c.conn = nil
			c.mu.Unlock()
			stop()
			conn.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (c *console) write(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.size+int64(len(p)) > maxConsole {
		c.file.Close()
		os.Rename(c.path, c.path+".1")
		f, err := os.OpenFile(c.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return
		}
		c.file, c.size = f, 0
	}
	n, _ := c.file.Write(p)
	c.size += int64(n)
	c.tail = append(c.tail, p...)
	if over := len(c.tail) - 4096; over > 0 {
		c.tail = append(c.tail[:0], c.tail[over:]...)
	}
	for s := range c.see {
		select {
		case s <- append([]byte(nil), p...):
		default: // a slow watcher misses some
		}
	}
}

// hint is the last that a machine said which did not come up, and where the rest is.
func (c *console) hint() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := strings.FieldsFunc(string(c.tail), func(r rune) bool { return r == '\n' || r == '\r' })
	for i := len(lines) - 1; i >= 0; i-- {
		if l := strings.TrimSpace(bounded(lines[i])); l != "" {
			return "; its last words: " + l + "; its console is in " + c.path
		}
	}
	return "; it said nothing on its console (" + c.path + ")"
}

// attach joins a stream with the console until either ends.
func (c *console) attach(ctx context.Context, s io.ReadWriter) error {
	see := make(chan []byte, 256)
	c.mu.Lock()
	c.see[see] = true
	recent := append([]byte(nil), c.tail...)
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.see, see)
		c.mu.Unlock()
	}()
	if _, err := s.Write(recent); err != nil {
		return err
	}
	typed := make(chan error, 1)
	go func() {
		buf := make([]byte, 1024)
		for {
			n, err := s.Read(buf)
			if n > 0 {
				c.mu.Lock()
				conn := c.conn
				c.mu.Unlock()
				if conn != nil {
					conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
					conn.Write(buf[:n])
				}
			}
			if err != nil {
				typed <- err
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-typed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case p := <-see:
			if _, err := s.Write(p); err != nil {
				return err
			}
		}
	}
}

// readTail gives the last bytes of a file and of the one before it.
func readTail(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	off := max(0, fi.Size()-most)
	b := make([]byte, fi.Size()-off)
	n, err := f.ReadAt(b, off)
	if err == io.EOF {
		err = nil
	}
	b = b[:n]
	if off == 0 && fi.Size() < most {
		if before, berr := os.ReadFile(path + ".1"); berr == nil {
			keep := min(int64(len(before)), most-fi.Size())
			b = append(before[int64(len(before))-keep:], b...)
		}
	}
	return b, err
}
