package logs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func stamp(i int) string { return epoch.Add(time.Duration(i) * time.Second).Format(time.RFC3339Nano) }

func jsonLine(i int, stream string) string {
	return fmt.Sprintf(`{"log":"line %d\n","stream":%q,"time":%q}`+"\n", i, stream, stamp(i))
}

func write(t *testing.T, path, s string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(s); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path, format string) *Log {
	t.Helper()
	l, err := Open(path, format, NewWatcher())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func read(t *testing.T, l *Log, o Options) []string {
	t.Helper()
	var got []string
	err := l.Read(context.Background(), o, func(r Record) error {
		got = append(got, strings.TrimSuffix(string(r.Line), "\n"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func names(from, to int) []string {
	var s []string
	for i := from; i < to; i++ {
		s = append(s, fmt.Sprintf("line %d", i))
	}
	return s
}

func TestReadRotatedFilesWithBounds(t *testing.T) {
	p := filepath.Join(t.TempDir(), "c.log")
	for i := range 30 { // ten a file; even ones are stderr
		path := p
		if i < 20 {
			path = fmt.Sprintf("%s.%d", p, 2-i/10)
		}
		write(t, path, jsonLine(i, []string{"stderr", "stdout"}[i%2]))
	}
	both := Options{Stdout: true, Stderr: true, Tail: -1}
	at := func(i int) time.Time { return epoch.Add(time.Duration(i) * time.Second) }
	for name, c := range map[string]struct {
		change func(*Options)
		want   []string
	}{
		"all":            {func(*Options) {}, names(0, 30)},
		"since":          {func(o *Options) { o.Since = at(25) }, names(25, 30)},
		"until":          {func(o *Options) { o.Until = at(3) }, names(0, 4)},
		"between":        {func(o *Options) { o.Since, o.Until = at(8), at(12) }, names(8, 13)},
		"tail in one":    {func(o *Options) { o.Tail = 3 }, names(27, 30)},
		"tail across":    {func(o *Options) { o.Tail = 15 }, names(15, 30)},
		"tail of a file": {func(o *Options) { o.Tail = 10 }, names(20, 30)},
		"tail of all":    {func(o *Options) { o.Tail = 100 }, names(0, 30)},
		"tail nothing":   {func(o *Options) { o.Tail = 0 }, nil},
		"tail, one kind": {func(o *Options) { o.Tail, o.Stderr = 2, false }, []string{"line 27", "line 29"}},
		"tail, until":    {func(o *Options) { o.Tail, o.Until = 2, at(15) }, names(14, 16)},
		"tail, since":    {func(o *Options) { o.Tail, o.Since = 20, at(28) }, names(28, 30)},
		"no stream":      {func(o *Options) { o.Stdout, o.Stderr = false, false }, nil},
	} {
		o := both
		c.change(&o)
		if got := read(t, open(t, p, "json-file"), o); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

// A clock that was set forward and back again leaves records out of order; each
// bound still finds all of its own.
func TestClockJumps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.log")
	for _, i := range []int{0, 1, 5000, 5001, 2, 3} {
		write(t, path, jsonLine(i, "stdout"))
	}
	l := open(t, path, "json-file")
	at := func(i int) time.Time { return epoch.Add(time.Duration(i) * time.Second) }
	for name, c := range map[string]struct {
		o    Options
		want []string
	}{
		"since":          {Options{Stdout: true, Tail: -1, Since: at(5000)}, []string{"line 5000", "line 5001"}},
		"until":          {Options{Stdout: true, Tail: -1, Until: at(10)}, []string{"line 0", "line 1", "line 2", "line 3"}},
		"since and tail": {Options{Stdout: true, Tail: 2, Since: at(1000)}, []string{"line 5000", "line 5001"}},
		"tail":           {Options{Stdout: true, Tail: 3}, []string{"line 5001", "line 2", "line 3"}},
	} {
		if got := read(t, l, c.o); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestTornRecords(t *testing.T) {
	p := filepath.Join(t.TempDir(), "c.log")
	whole := jsonLine(1, "stdout")
	write(t, p, jsonLine(0, "stdout")+whole[:30]+jsonLine(2, "stdout")+"garbage\n\n\x00\x00\x00\n"+jsonLine(3, "stdout")+whole[:40])
	l := open(t, p, "json-file")
	want := []string{"line 0", "line 2", "line 3"}
	if got := read(t, l, Options{Stdout: true, Tail: -1}); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if got := read(t, l, Options{Stdout: true, Tail: 2}); !slices.Equal(got, want[1:]) {
		t.Errorf("tail: got %q", got)
	}
}

func TestK8sFormat(t *testing.T) {
	p := filepath.Join(t.TempDir(), "0.log")
	write(t, p, stamp(0)+" stdout P par\n"+stamp(1)+" stdout F t\n"+stamp(2)+" stderr F oops\nbad line\n"+stamp(3)+" stdout F \n")
	var got []string
	l := open(t, p, "k8s-file")
	if err := l.Read(context.Background(), Options{Stdout: true, Tail: -1}, func(r Record) error { got = append(got, string(r.Line)); return nil }); err != nil {
		t.Fatal(err)
	}
	if want := []string{"par", "t\n", "\n"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFollowThroughRotationAndTruncation(t *testing.T) {
	for _, poll := range []bool{false, true} {
		p := filepath.Join(t.TempDir(), "c.log")
		l := open(t, p, "json-file")
		ended := make(chan struct{})
		lines := make(chan string, 1000)
		done := make(chan error, 1)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if poll {
			l.watch = pollingWatcher()
		}
		go func() {
			done <- l.Read(ctx, Options{Stdout: true, Tail: -1, Ended: ended}, func(r Record) error {
				lines <- strings.TrimSuffix(string(r.Line), "\n")
				return nil
			})
		}()
		expect := func(want ...string) {
			t.Helper()
			for _, w := range want {
				select {
				case got := <-lines:
					if got != w {
						t.Fatalf("got %q, want %q", got, w)
					}
				case err := <-done:
					t.Fatalf("ended early: %v", err)
				case <-ctx.Done():
					t.Fatalf("nothing came, want %q", w)
				}
			}
		}
		time.Sleep(20 * time.Millisecond) // the log does not exist yet
		write(t, p, jsonLine(0, "stdout"))
		expect("line 0")
		one := jsonLine(1, "stdout")
		write(t, p, one[:20])
		time.Sleep(20 * time.Millisecond)
		write(t, p, one[20:])
		expect("line 1")
		// two rotations at once, with records in each file
		write(t, p, jsonLine(2, "stdout"))
		must(t, os.Rename(p, p+".1"))
		write(t, p, jsonLine(3, "stdout"))
		must(t, os.Rename(p+".1", p+".2"))
		must(t, os.Rename(p, p+".1"))
		write(t, p, jsonLine(4, "stdout"))
		expect("line 2", "line 3", "line 4")
		must(t, os.Truncate(p, 0))
		time.Sleep(300 * time.Millisecond) // seen as empty
		write(t, p, jsonLine(5, "stdout"))
		expect("line 5")
		write(t, p, jsonLine(6, "stdout"))
		close(ended)
		expect("line 6")
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		l.watch.mu.Lock()
		if l.watch.file != nil || len(l.watch.watchs) != 0 {
			t.Error("the watcher is still open")
		}
		l.watch.mu.Unlock()
	}
}

func TestFollowTailZeroSeesOnlyWhatIsNew(t *testing.T) {
	p := filepath.Join(t.TempDir(), "c.log")
	write(t, p, jsonLine(0, "stdout"))
	ended := make(chan struct{})
	got := make(chan string, 10)
	done := make(chan error, 1)
	l := open(t, p, "json-file")
	ready := make(chan struct{})
	go func() {
		close(ready)
		done <- l.Read(context.Background(), Options{Stdout: true, Tail: 0, Ended: ended}, func(r Record) error { got <- string(r.Line); return nil })
	}()
	<-ready
	time.Sleep(50 * time.Millisecond)
	write(t, p, jsonLine(1, "stdout"))
	close(ended)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	close(got)
	var all []string
	for s := range got {
		all = append(all, s)
	}
	if !slices.Equal(all, []string{"line 1\n"}) {
		t.Errorf("got %q", all)
	}
}

func TestReadEndsWithContextAndEmitError(t *testing.T) {
	p := filepath.Join(t.TempDir(), "c.log")
	write(t, p, jsonLine(0, "stdout"))
	l := open(t, p, "json-file")
	boom := errors.New("boom")
	if err := l.Read(context.Background(), Options{Stdout: true, Tail: -1}, func(Record) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	err := l.Read(ctx, Options{Stdout: true, Tail: -1, Ended: make(chan struct{})}, func(Record) error { return nil })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if _, err := Open(p, "journald", nil); err == nil {
		t.Error("an unknown format opens")
	}
}

func TestLongBackwardsRead(t *testing.T) {
	p := filepath.Join(t.TempDir(), "c.log")
	var b strings.Builder
	for i := range 5000 {
		b.WriteString(jsonLine(i, "stdout"))
	}
	write(t, p, b.String())
	for _, n := range []int{1, 399, 400, 401, 2500, 5000} {
		got := read(t, open(t, p, "json-file"), Options{Stdout: true, Stderr: true, Tail: n})
		if !slices.Equal(got, names(5000-n, 5000)) {
			t.Errorf("tail %d: %d records, first %q", n, len(got), got[0])
		}
	}
}

func pollingWatcher() *Watcher { w := NewWatcher(); w.noInotify = true; return w }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(jsonLine(0, "stdout")))
	f.Add([]byte(stamp(0) + " stdout P x"))
	f.Add([]byte(`{"log":"{\"log\":`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, ok := decodeJSON(b); ok && r.Time.IsZero() {
			t.Error("a record without a time")
		}
		decodeK8s(b)
	})
}
