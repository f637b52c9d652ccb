package logs

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func drain(t *testing.T, tail *Tail, max int) []string {
	t.Helper()
	var got []string
	for {
		recs, err := tail.Next(max)
		must(t, err)
		if len(recs) == 0 {
			return got
		}
		for _, r := range recs {
			got = append(got, strings.TrimSuffix(string(r.Line), "\n"))
		}
	}
}

func reopen(t *testing.T, c Cursor) Cursor {
	t.Helper()
	back, err := DecodeCursor(c.Encode())
	must(t, err)
	if back != c {
		t.Fatalf("a cursor comes back as %+v instead of %+v", back, c)
	}
	return back
}

func TestTailGoesOnFromACursorThroughRotations(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	l := open(t, p, "json-file")
	lost := 0
	var cur Cursor
	take := func(max int) []string {
		tail, err := l.From(cur, func(time.Time) { lost++ })
		must(t, err)
		defer tail.Close()
		recs, err := tail.Next(max)
		must(t, err)
		var got []string
		for _, r := range recs {
			got = append(got, strings.TrimSuffix(string(r.Line), "\n"))
		}
		cur = reopen(t, tail.Cursor())
		return got
	}
	expect := func(got, want []string, losses int) {
		t.Helper()
		if !slices.Equal(got, want) || lost != losses {
			t.Fatalf("got %q and %d losses, want %q and %d", got, lost, want, losses)
		}
	}
	expect(take(10), nil, 0) // there is no log yet
	for i := range 6 {
		write(t, p, jsonLine(i, "stdout"))
	}
	expect(take(2), names(0, 2), 0)
	if b := l.Behind(cur); b != int64(4*len(jsonLine(0, "stdout"))) {
		t.Errorf("behind by %d bytes", b)
	}
	rotate := func() {
		_ = os.Rename(p+".1", p+".2")
		must(t, os.Rename(p, p+".1"))
	}
	rotate()
	write(t, p, jsonLine(6, "stdout"))
	expect(take(3), names(2, 5), 0)
	rotate()
	write(t, p, jsonLine(7, "stdout"))
	expect(take(10), names(5, 8), 0)
	// What comes after is rotated away before it is read.
	for i := 8; i < 14; i++ {
		write(t, p, jsonLine(i, "stdout"))
		rotate()
	}
	write(t, p, jsonLine(14, "stdout"))
	expect(take(10), names(12, 15), 1)
	expect(take(10), nil, 1)
}

func TestTailNoticesAnotherFileInItsInode(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	l := open(t, p, "json-file")
	for i := range 3 {
		write(t, p, jsonLine(i, "stdout"))
	}
	tail, err := l.From(Cursor{}, nil)
	must(t, err)
	drain(t, tail, 2)
	cur := tail.Cursor()
	tail.Close()
	// The same inode with other content, as a file system may give it again.
	must(t, os.Truncate(p, 0))
	for i := range 5 {
		write(t, p, jsonLine(20+i, "stdout"))
	}
	lost := 0
	tail, err = l.From(cur, func(time.Time) { lost++ })
	must(t, err)
	defer tail.Close()
	if got := drain(t, tail, 100); len(got) != 5 || lost != 1 {
		t.Errorf("got %q, %d losses", got, lost)
	}
}

func TestTailWaits(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	l := open(t, p, "json-file")
	tail, err := l.From(Cursor{}, func(time.Time) { t.Error("lost") })
	must(t, err)
	defer tail.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 200 {
			write(t, p, jsonLine(i, "stdout"))
			if i%50 == 49 {
				// All are kept: a reader that comes late loses none.
				_ = os.Rename(p+".3", p+".4")
				_ = os.Rename(p+".2", p+".3")
				_ = os.Rename(p+".1", p+".2")
				_ = os.Rename(p, p+".1")
			}
		}
	}()
	var got []string
	for len(got) < 200 {
		got = append(got, drain(t, tail, 7)...)
		if len(got) < 200 && !tail.Wait(ctx, nil) {
			t.Fatalf("nothing more came after %d", len(got))
		}
	}
	<-done
	if !slices.Equal(got, names(0, 200)) {
		t.Errorf("got %d, first %q", len(got), got[:3])
	}
	ended := make(chan struct{})
	close(ended)
	for tail.Wait(ctx, ended) {
	}
}

func TestTailSkipsWhatIsNoRecord(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	l := open(t, p, "json-file")
	write(t, p, jsonLine(0, "stdout")+strings.Repeat("x", maxLine+5000)+"\n"+jsonLine(1, "stdout")+"garbage\n"+jsonLine(2, "stderr")+`{"log":"half`)
	tail, err := l.From(Cursor{}, nil)
	must(t, err)
	if got := drain(t, tail, 1); !slices.Equal(got, names(0, 3)) {
		t.Errorf("got %q", got)
	}
	cur := tail.Cursor()
	tail.Close()
	write(t, p, "\n"+jsonLine(3, "stdout"))
	tail, err = l.From(reopen(t, cur), func(time.Time) { t.Error("lost") })
	must(t, err)
	defer tail.Close()
	if got := drain(t, tail, 100); !slices.Equal(got, names(3, 4)) {
		t.Errorf("got %q", got)
	}
}

func FuzzDecodeCursor(f *testing.F) {
	f.Add(Cursor{ino: 1, off: 100, line: 10, sum: 7, at: 5}.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := DecodeCursor(b); err == nil && !bytes.Equal(c.Encode(), b) {
			t.Errorf("%x is read as %+v", b, c)
		}
	})
}
