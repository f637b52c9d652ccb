package osinit

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestFetch takes up downloads that break off, from servers that know ranges and from those that
// do not, and gives up where nothing comes any more.
func TestFetch(t *testing.T) {
	whole := make([]byte, 3<<20)
	rand.Read(whole)
	for name, c := range map[string]struct {
		ranges    bool
		breaks    int32 // so many connections break off, each after a MiB
		want      string
		wantTries int32
	}{
		"whole":             {true, 0, "", 1},
		"broken":            {true, 2, "", 3},
		"broken, no ranges": {false, 2, "", 3},
		"broken for good":   {false, 100, "broke off after 1048576", fetchTries + 1},
	} {
		t.Run(name, func(t *testing.T) {
			var tries, ranged atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				n := tries.Add(1)
				w.Header().Set("ETag", `"one"`)
				rest := whole
				if from := r.Header.Get("Range"); from != "" && c.ranges {
					if r.Header.Get("If-Range") != `"one"` {
						t.Errorf("the range is of any file: %v", r.Header)
					}
					var at int
					if _, err := fmt.Sscanf(from, "bytes=%d-", &at); err != nil {
						t.Error(err)
					}
					ranged.Add(1)
					rest = whole[at:]
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", at, len(whole)-1, len(whole)))
					w.Header().Set("Content-Length", fmt.Sprint(len(rest)))
					w.WriteHeader(http.StatusPartialContent)
				} else {
					w.Header().Set("Content-Length", fmt.Sprint(len(rest)))
				}
				if n <= c.breaks {
					w.Write(rest[:min(len(rest), 1<<20)])
					w.(http.Flusher).Flush()
					panic(http.ErrAbortHandler)
				}
				w.Write(rest)
			}))
			defer s.Close()
			u, err := url.Parse(s.URL)
			if err != nil {
				t.Fatal(err)
			}
			d := newFetch(t.Context(), u)
			d.wait = time.Millisecond
			if err := d.open(); err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			got, err := io.ReadAll(d)
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("%v, want %q", err, c.want)
				}
			} else if err != nil || !bytes.Equal(got, whole) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			if tries.Load() != c.wantTries || c.ranges && ranged.Load() != c.breaks {
				t.Errorf("%d tries, %d of a range", tries.Load(), ranged.Load())
			}
		})
	}
}

// TestFetchStalls hangs up where nothing comes for long.
func TestFetchStalls(t *testing.T) {
	var tries atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "2")
		if tries.Add(1) == 1 {
			w.Write([]byte("a"))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		w.Write([]byte("ab"))
	}))
	defer s.Close()
	u, _ := url.Parse(s.URL)
	d := newFetch(t.Context(), u)
	d.wait, d.stall = time.Millisecond, 50*time.Millisecond
	if err := d.open(); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if got, err := io.ReadAll(d); err != nil || string(got) != "ab" {
		t.Fatalf("%q, %v", got, err)
	}
}
