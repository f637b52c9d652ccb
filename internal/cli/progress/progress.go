// Package progress shows the progress messages of pulls, pushes and loads: on a
// terminal one line a layer that is redrawn, elsewhere plain lines. The command
// line imports it.
package progress

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/client"
)

// redraw is the least time between two frames.
const redraw = 50 * time.Millisecond

// Writer shows messages. It is not safe for concurrent use.
type Writer struct {
	w       io.Writer
	tty     bool
	size    func() (width, height int)
	now     func() time.Time
	order   []string
	lines   map[string]*line
	drawn   int // lines on the screen that belong to us
	last    time.Time
	started map[string]time.Time
	dirty   bool
}

type line struct {
	status     string
	cur, total int64
}

// New makes a writer on w; size tells a terminal's size, nil means that w is no
// terminal.
func New(w io.Writer, size func() (width, height int)) *Writer {
	return &Writer{w: w, tty: size != nil, size: size, now: time.Now, lines: map[string]*line{}, started: map[string]time.Time{}}
}

// Show takes one message.
func (p *Writer) Show(m client.Progress) error {
	if m.Stream != "" {
		if err := p.Flush(); err != nil {
			return err
		}
		p.forget()
		_, err := io.WriteString(p.w, m.Stream)
		return err
	}
	if m.Status == "" && m.Progress == nil {
		return nil
	}
	if m.ID == "" {
		if err := p.Flush(); err != nil {
			return err
		}
		p.forget()
		_, err := fmt.Fprintln(p.w, m.Status)
		return err
	}
	l := p.lines[m.ID]
	fresh := l == nil || l.status != m.Status
	if l == nil {
		l = &line{}
		p.lines[m.ID] = l
		p.order = append(p.order, m.ID)
	}
	if fresh {
		p.started[m.ID] = p.now()
	}
	*l = line{status: m.Status}
	if m.Progress != nil {
		l.cur, l.total = m.Progress.Current, m.Progress.Total
	}
	if !p.tty {
		// Numbers are noise in a file: a line for each new state is enough.
		if !fresh {
			return nil
		}
		_, err := fmt.Fprintf(p.w, "%s: %s\n", m.ID, m.Status)
		return err
	}
	p.dirty = true
	if now := p.now(); now.Sub(p.last) >= redraw {
		p.last = now
		return p.draw()
	}
	return nil
}

// Flush draws what was held back.
func (p *Writer) Flush() error {
	if !p.tty || !p.dirty {
		return nil
	}
	return p.draw()
}

// forget leaves the lines on the screen as they are and begins a new block.
func (p *Writer) forget() {
	p.drawn, p.order, p.dirty = 0, nil, false
	clear(p.lines)
}

func (p *Writer) draw() error {
	width, height := p.size()
	if width <= 0 {
		width = 80
	}
	shown := p.order
	var b strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", p.drawn)
	}
	hidden := 0
	if height > 2 && len(shown) > height-1 { // keep within the screen, active lines first
		shown, hidden = p.active(height-2), 0
		hidden = len(p.order) - len(shown)
	}
	for _, id := range shown {
		b.WriteString("\r\x1b[K")
		b.WriteString(p.render(id, width))
		b.WriteByte('\n')
	}
	n := len(shown)
	if hidden > 0 {
		fmt.Fprintf(&b, "\r\x1b[K… and %d more\n", hidden)
		n++
	}
	for i := n; i < p.drawn; i++ {
		b.WriteString("\r\x1b[K\n")
	}
	p.drawn = max(n, p.drawn)
	p.dirty = false
	_, err := io.WriteString(p.w, b.String())
	return err
}

// active picks n ids, those with numbers before those without.
func (p *Writer) active(n int) []string {
	out := make([]string, 0, n)
	for _, moving := range []bool{true, false} {
		for _, id := range p.order {
			l := p.lines[id]
			if (l.cur > 0 && l.cur < l.total) == moving && len(out) < n {
				out = append(out, id)
			}
		}
	}
	return out
}

func (p *Writer) render(id string, width int) string {
	l := p.lines[id]
	s := clean(id) + ": " + clean(l.status)
	if l.cur > 0 || l.total > 0 {
		s += " " + bar(l.cur, l.total, width-len(s)-30)
		s += fmt.Sprintf(" %s", units.HumanSize(float64(l.cur)))
		if l.total > 0 {
			s += "/" + units.HumanSize(float64(l.total))
		}
		if t := p.now().Sub(p.started[id]); t > time.Second && l.cur < l.total {
			left := time.Duration(float64(t) * float64(l.total-l.cur) / float64(l.cur+1)).Round(time.Second)
			s += " " + left.String()
		}
	}
	if r := []rune(s); len(r) > width-1 && width > 1 {
		s = string(r[:width-1])
	}
	return s
}

// clean keeps control characters of the other side off the terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return -1
		}
		return r
	}, s)
}

func bar(cur, total int64, width int) string {
	width = min(width, 50)
	if total <= 0 || width < 5 {
		return ""
	}
	n := int(float64(width) * min(1, float64(cur)/float64(total)))
	if n >= width {
		return "[" + strings.Repeat("=", width) + "]"
	}
	return "[" + strings.Repeat("=", n) + ">" + strings.Repeat(" ", width-n-1) + "]"
}
