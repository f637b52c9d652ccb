package process

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Ask runs a program to its end with an input, and returns its output: what it says
// when it fails is the error. The table must be running.
func (t *Table) Ask(ctx context.Context, p Program, input []byte) ([]byte, error) {
	in, feed, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	defer feed.Close()
	drain, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer drain.Close()
	defer out.Close()
	p.Input, p.Output = in, out
	child, err := t.Start(p)
	if err != nil {
		return nil, err
	}
	in.Close()
	out.Close()
	go func() {
		feed.Write(input)
		feed.Close()
	}()
	stop := context.AfterFunc(ctx, func() { unix.Kill(child.PID, unix.SIGKILL) })
	defer stop()
	var b bytes.Buffer
	_, err = io.Copy(&b, io.LimitReader(drain, 1<<20))
	status := <-child.Done()
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s did not answer: %w", p.Path, ctx.Err())
	case !status.Exited() || status.ExitStatus() != 0:
		if text := strings.TrimSpace(b.String()); text != "" && len(text) < 4096 {
			return nil, fmt.Errorf("%s", text)
		}
		return nil, fmt.Errorf("%s: %s", p.Path, Describe(status))
	}
	return b.Bytes(), err
}
