package display

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

func TestPlain(t *testing.T) {
	var b bytes.Buffer
	p := New(&b, Options{Mode: Auto})
	p.Event(Event{ID: "Container a", Status: "Creating"})
	p.Event(Event{ID: "layer", Parent: "img", Current: 1, Total: 2})
	p.Event(Event{ID: "Container \x1b[2Ja", Status: "Created", State: Done})
	p.Print("line")
	p.Close()
	if got, want := b.String(), " Container a  Creating\n Container [2Ja  Created\nline\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestJSON(t *testing.T) {
	var b bytes.Buffer
	p := New(&b, Options{Mode: JSON, DryRun: true})
	p.Event(Event{ID: "x", Status: "Pulling", Current: 1, Total: 4})
	if got, want := b.String(), `{"dry-run":true,"id":"x","status":"Pulling","current":1,"total":4,"percent":25}`+"\n"; got != want {
		t.Errorf("got %q", got)
	}
}

func TestScreenKeepsToItsSize(t *testing.T) {
	var b bytes.Buffer
	p := New(&b, Options{Mode: TTY, Size: func() (int, int) { return 30, 6 }})
	s := p.(*screen)
	for _, id := range []string{"Container one", "Container two", "Container three", "Container four", "Container five-with-a-long-name"} {
		p.Event(Event{ID: id, Status: "Creating a thing that takes many words to tell"})
	}
	s.mu.Lock()
	b.Reset()
	s.draw(false)
	out := b.String()
	s.mu.Unlock()
	if i := strings.LastIndex(out, "\x1b[J"); i >= 0 {
		out = out[i+3:]
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) > 5 || !strings.Contains(out, "… and 2 more") {
		t.Errorf("got %d lines: %q", len(lines), out)
	}
	for _, l := range lines {
		if n := len([]rune(l)); n > 30 {
			t.Errorf("a line has %d cells: %q", n, l)
		}
	}
	p.Close()
	p.Close()
}

func TestParseMode(t *testing.T) {
	for in, want := range map[string]Mode{"": Auto, "plain": Plain, "none": Quiet, "json": JSON} {
		if got, err := ParseMode(in); err != nil || got != want {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
	if _, err := ParseMode("fancy"); err == nil {
		t.Error("nonsense passes")
	}
}

func TestLogs(t *testing.T) {
	var b bytes.Buffer
	l := NewLogs(&b, &b, LogOptions{Prefix: true})
	l.Register("db-1")
	l.Register("longer-1")
	w := l.Stdout("db-1")
	io.WriteString(w, "one\ntw")
	io.WriteString(w, "o\r\nthree")
	w.Close()
	l.Status("db-1", "exited with code 0")
	if got, want := b.String(), "db-1      | one\ndb-1      | two\ndb-1      | three\ndb-1 exited with code 0\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	b.Reset()
	l = NewLogs(&b, &b, LogOptions{Prefix: true, Color: true})
	io.WriteString(l.Stdout("a"), "x\n")
	io.WriteString(l.Stdout("b"), "x\n")
	if got, want := b.String(), "\x1b[36ma  | \x1b[0mx\n\x1b[33mb  | \x1b[0mx\n"; got != want {
		t.Errorf("got %q", got)
	}
}
