package display

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// palette is what names are coloured with, in turn.
var palette = []string{"36", "33", "32", "35", "34", "96", "93", "92", "95", "94"}

// LogOptions of NewLogs.
type LogOptions struct {
	Color, Prefix, Timestamps bool
}

// Logs shows lines of several containers, each behind its name.
type Logs struct {
	mu       sync.Mutex
	out, err io.Writer
	o        LogOptions
	colors   map[string]string
	width    int
}

// NewLogs shows standard output on out and standard error on err.
func NewLogs(out, err io.Writer, o LogOptions) *Logs {
	return &Logs{out: out, err: err, o: o, colors: map[string]string{}}
}

// Register makes room for a name, in the order of which colours are given.
func (l *Logs) Register(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.register(name)
}

func (l *Logs) register(name string) string {
	c, ok := l.colors[name]
	if !ok {
		c = palette[len(l.colors)%len(palette)]
		l.colors[name] = c
		l.width = max(l.width, len(name))
	}
	return c
}

func (l *Logs) prefix(name string) string {
	c := l.register(name)
	if !l.o.Prefix {
		return ""
	}
	p := fmt.Sprintf("%-*s  | ", l.width, name)
	if l.o.Color {
		return "\x1b[" + c + "m" + p + "\x1b[0m"
	}
	return p
}

func (l *Logs) write(w io.Writer, name, line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.prefix(name)
	if l.o.Timestamps {
		text += time.Now().UTC().Format("2006-01-02T15:04:05.000000000Z07:00") + " "
	}
	io.WriteString(w, text+line+"\n")
}

// Status is a line about a container that it did not write itself.
func (l *Logs) Status(name, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.register(name)
	s := name + " " + text
	if l.o.Color {
		s = "\x1b[" + c + "m" + s + "\x1b[0m"
	}
	io.WriteString(l.out, s+"\n")
}

// Stdout and Stderr give writers for a container's output; what is left of a
// line is shown by Close.
func (l *Logs) Stdout(name string) io.WriteCloser { return &lineWriter{l: l, w: l.out, name: name} }

// Stderr is Stdout for the other stream.
func (l *Logs) Stderr(name string) io.WriteCloser { return &lineWriter{l: l, w: l.err, name: name} }

// maxLine bounds what is kept of an unfinished line.
const maxLine = 1 << 20

type lineWriter struct {
	l    *Logs
	w    io.Writer
	name string
	buf  bytes.Buffer
}

func (w *lineWriter) Write(p []byte) (int, error) {
	n := len(p)
	for {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			break
		}
		w.buf.Write(p[:i])
		w.flush()
		p = p[i+1:]
	}
	w.buf.Write(p)
	if w.buf.Len() > maxLine {
		w.flush()
	}
	return n, nil
}

func (w *lineWriter) flush() {
	w.l.write(w.w, w.name, strings.TrimSuffix(w.buf.String(), "\r"))
	w.buf.Reset()
}

func (w *lineWriter) Close() error {
	if w.buf.Len() > 0 {
		w.flush()
	}
	return nil
}
