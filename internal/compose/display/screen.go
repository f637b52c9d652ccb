package display

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/docker/go-units"
)

// screen is a list that is drawn again and again in place.
type screen struct {
	mu     sync.Mutex
	w      io.Writer
	o      Options
	order  []string
	lines  map[string]*entry
	drawn  int // lines on the screen
	frame  int
	begin  time.Time
	stop   chan struct{}
	done   chan struct{}
	closed bool
}

type entry struct {
	Event
	begin, end time.Time
	layers     map[string]*Event
}

func newScreen(w io.Writer, o Options) *screen {
	if o.Title == "" {
		o.Title = "Running"
	}
	s := &screen{w: w, o: o, lines: map[string]*entry{}, begin: time.Now(), stop: make(chan struct{}), done: make(chan struct{})}
	go s.run()
	return s
}

func (s *screen) run() {
	defer close(s.done)
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			s.mu.Lock()
			s.frame++
			s.draw(false)
			s.mu.Unlock()
		case <-s.stop:
			return
		}
	}
}

func (s *screen) Event(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.Parent != "" {
		p := s.lines[e.Parent]
		if p == nil {
			p = s.add(Event{ID: e.Parent})
		}
		if p.layers == nil {
			p.layers = map[string]*Event{}
		}
		p.layers[e.ID] = &e
		return
	}
	l := s.lines[e.ID]
	if l == nil {
		l = s.add(e)
	}
	l.Event = e
	if l.end = (time.Time{}); e.State != Working {
		l.end = time.Now()
	}
}

func (s *screen) add(e Event) *entry {
	l := &entry{Event: e, begin: time.Now()}
	s.lines[e.ID] = l
	s.order = append(s.order, e.ID)
	return l
}

func (s *screen) Print(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	fmt.Fprintln(s.w, line)
	s.draw(false)
}

func (s *screen) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	s.mu.Unlock()
	close(s.stop)
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draw(true)
}

// erase takes the list off the screen.
func (s *screen) erase() {
	if s.drawn > 0 {
		fmt.Fprintf(s.w, "\x1b[%dA\x1b[J", s.drawn)
		s.drawn = 0
	}
}

// draw shows the list; what does not fit is counted, those at work come first.
func (s *screen) draw(last bool) {
	if len(s.order) == 0 {
		return
	}
	width, height := s.o.Size()
	if width <= 0 {
		width = 80
	}
	if height <= 0 {
		height = 24
	}
	ids := s.order
	hidden := 0
	if room := height - 3; !last && len(ids) > room && room > 0 {
		ids = slices.Clone(ids)
		slices.SortStableFunc(ids, func(a, b string) int { return int(s.rank(a)) - int(s.rank(b)) })
		hidden = len(ids) - room
		ids = ids[:room]
	}
	done, names := 0, 0
	for _, l := range s.lines {
		if l.State != Working {
			done++
		}
	}
	for _, id := range ids {
		names = max(names, utf8.RuneCountInString(s.label(s.lines[id])))
	}
	var b strings.Builder
	if s.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\x1b[J", s.drawn)
	}
	head := fmt.Sprintf("[+] %s %d/%d", s.o.Title, done, len(s.order))
	if s.o.DryRun {
		head = dryRun + head
	}
	b.WriteString(s.paint(blue, done == len(s.order), head) + "\n")
	n := 1
	for _, id := range ids {
		b.WriteString(s.line(s.lines[id], names, width) + "\n")
		n++
	}
	if hidden > 0 {
		fmt.Fprintf(&b, "   … and %d more\n", hidden)
		n++
	}
	io.WriteString(s.w, b.String())
	s.drawn = n
}

func (s *screen) rank(id string) State {
	switch s.lines[id].State {
	case Failed:
		return 0
	case Working:
		return 1
	}
	return 2
}

func (s *screen) label(l *entry) string {
	out := clean(l.ID)
	if l.Text != "" {
		out += " " + clean(l.Text)
	}
	return out
}

var frames = []string{"⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"}

func (s *screen) line(l *entry, names, width int) string {
	mark, color := frames[s.frame%len(frames)], noColor
	switch l.State {
	case Done:
		mark, color = "✔", green
	case Warning:
		mark, color = "!", yellow
	case Failed:
		mark, color = "✘", red
	}
	end := l.end
	if end.IsZero() {
		end = time.Now()
	}
	timer := fmt.Sprintf("%.1fs", end.Sub(l.begin).Seconds())
	label := s.label(l)
	pad := strings.Repeat(" ", max(0, names-utf8.RuneCountInString(label)))
	status := clean(l.Status)
	if bytes := l.bytes(); bytes != "" && l.State == Working {
		status += " " + bytes
	}
	room := width - 3 - names - 2 - len(timer) - 2
	status = shorten(status, max(0, room))
	gap := strings.Repeat(" ", max(1, room-utf8.RuneCountInString(status)+1))
	if room < 0 {
		return " " + s.paint(color, true, mark) + " " + shorten(label, width-3)
	}
	return " " + s.paint(color, true, mark) + " " + label + pad + "  " + s.paint(color, true, status) + gap + s.paint(blue, true, timer)
}

// bytes sums the layers of an image up.
func (l *entry) bytes() string {
	cur, total := l.Current, l.Total
	for _, e := range l.layers {
		cur += e.Current
		total += e.Total
	}
	if total <= 0 {
		return ""
	}
	cur = min(cur, total)
	const cells = 10
	full := int(cur * cells / total)
	return fmt.Sprintf("[%s%s] %s/%s", strings.Repeat("█", full), strings.Repeat("░", cells-full),
		units.HumanSizeWithPrecision(float64(cur), 3), units.HumanSizeWithPrecision(float64(total), 3))
}

func shorten(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	r := []rune(s)
	if n <= 1 {
		return string(r[:max(0, n)])
	}
	return string(r[:n-1]) + "…"
}

// clean keeps what others wrote from moving the cursor.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0:
			return -1
		}
		return r
	}, s)
}

// Colours as their SGR numbers.
const (
	noColor = ""
	red     = "31"
	green   = "32"
	yellow  = "33"
	blue    = "34"
)

func (s *screen) paint(color string, on bool, text string) string {
	if !s.o.Color || !on || color == noColor || text == "" {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}
