package cli

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// relayed is a connection through the standard streams of a program.
type relayed struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  io.ReadCloser
	once sync.Once
	err  error
}

func relay(cmd *exec.Cmd) (net.Conn, error) {
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &relayed{cmd: cmd, in: in, out: out}, nil
}

func (c *relayed) Read(p []byte) (int, error)  { return c.out.Read(p) }
func (c *relayed) Write(p []byte) (int, error) { return c.in.Write(p) }

// Close ends the program.
func (c *relayed) Close() error {
	c.once.Do(func() {
		_ = c.in.Close()
		_ = c.cmd.Process.Kill()
		err := c.cmd.Wait()
		var ee *exec.ExitError
		if !errors.As(err, &ee) {
			c.err = err
		}
	})
	return c.err
}

func (c *relayed) LocalAddr() net.Addr              { return &net.UnixAddr{Net: "pipe"} }
func (c *relayed) RemoteAddr() net.Addr             { return &net.UnixAddr{Net: "pipe"} }
func (c *relayed) SetDeadline(time.Time) error      { return nil }
func (c *relayed) SetReadDeadline(time.Time) error  { return nil }
func (c *relayed) SetWriteDeadline(time.Time) error { return nil }

// decoded is the answers with those that are JSON as such.
func decoded(m map[string]string) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
		b, err := base64.StdEncoding.DecodeString(v)
		var x any
		if err == nil && strings.HasPrefix(strings.TrimSpace(string(b)), "{") && json.Unmarshal(b, &x) == nil {
			out[k] = x
		}
	}
	return out
}
