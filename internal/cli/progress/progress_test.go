package progress

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/jsonstream"

	"github.com/cloudos-io/cloudos/client"
)

func msg(id, status string, cur, total int64) client.Progress {
	m := client.Progress{ID: id, Status: status}
	if total > 0 {
		m.Progress = &jsonstream.Progress{Current: cur, Total: total}
	}
	return m
}

func TestPlain(t *testing.T) {
	var b bytes.Buffer
	p := New(&b, nil)
	for _, m := range []client.Progress{{Status: "Pulling from x"}, msg("l1", "Downloading", 1, 10), msg("l1", "Downloading", 5, 10), msg("l1", "Pull complete", 0, 0), {Stream: "Loaded\n"}, {}} {
		if err := p.Show(m); err != nil {
			t.Fatal(err)
		}
	}
	p.Flush()
	if want := "Pulling from x\nl1: Downloading\nl1: Pull complete\nLoaded\n"; b.String() != want {
		t.Errorf("%q", b.String())
	}
}

// screen plays a terminal: it follows the control sequences that we use.
func screen(out string) []string {
	lines, row := []string{""}, 0
	for len(out) > 0 {
		switch {
		case strings.HasPrefix(out, "\x1b["):
			i := strings.IndexAny(out, "AK")
			if out[i] == 'A' {
				n := 0
				for _, c := range out[2:i] {
					n = n*10 + int(c-'0')
				}
				row -= n
			} else {
				lines[row] = ""
			}
			out = out[i+1:]
		case out[0] == '\n':
			row++
			if row == len(lines) {
				lines = append(lines, "")
			}
			out = out[1:]
		case out[0] == '\r':
			out = out[1:]
		default:
			lines[row] += out[:1]
			out = out[1:]
		}
	}
	return lines
}

func TestTerminal(t *testing.T) {
	var b bytes.Buffer
	now := time.Unix(0, 0)
	p := New(&b, func() (int, int) { return 60, 20 })
	p.now = func() time.Time { now = now.Add(100 * time.Millisecond); return now }
	for _, m := range []client.Progress{{Status: "Pulling from x"}, msg("l1", "Downloading", 1, 10), msg("l2", "Waiting", 0, 0), msg("l1", "Downloading", 5, 10),
		msg("l2", "evil\x1b[2J", 0, 0), msg("l1", "Pull complete", 0, 0), msg("l2", "Pull complete", 0, 0), {Status: "Done"}} {
		if err := p.Show(m); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(screen(b.String()), "|"); got != "Pulling from x|l1: Pull complete|l2: Pull complete|Done|" {
		t.Errorf("%q", got)
	}
	if strings.Contains(b.String(), "\x1b[2J") {
		t.Error("the other side reached the terminal")
	}
}

// More layers than the screen has lines must not scroll the frame away.
func TestSmallScreen(t *testing.T) {
	var b bytes.Buffer
	now := time.Unix(0, 0)
	p := New(&b, func() (int, int) { return 40, 5 })
	p.now = func() time.Time { now = now.Add(100 * time.Millisecond); return now }
	for round := range int64(3) {
		for i := range 12 {
			if err := p.Show(msg(string(rune('a'+i)), "Downloading", round+1, 4)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if lines := screen(b.String()); len(lines) > 5+1 {
		t.Errorf("%d lines: %q", len(lines), lines)
	}
	for _, l := range screen(b.String()) {
		if len([]rune(l)) > 45 {
			t.Errorf("too wide: %q", l)
		}
	}
}

func TestBar(t *testing.T) {
	for _, x := range []struct {
		cur, total int64
		width      int
		want       string
	}{{0, 10, 10, "[>         ]"}, {5, 10, 10, "[=====>    ]"}, {10, 10, 10, "[==========]"}, {20, 10, 10, "[==========]"}, {1, 0, 10, ""}, {1, 2, 3, ""}} {
		if got := bar(x.cur, x.total, x.width); got != x.want {
			t.Errorf("%+v: %q", x, got)
		}
	}
}
