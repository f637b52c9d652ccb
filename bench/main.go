// Command bench measures Servin beside Docker, Podman, containerd's ctr, crun
// and runc on one machine: every contestant in turn, round after round, with its
// ordinary durability. It prints medians, 95th percentiles and ratios, and saves
// the raw data, a table and a plot. Start it with bench/run, which builds the
// peers and gives it namespaces of its own.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// row is one measure with what it is compared against.
type row struct {
	Name     string
	Unit     string
	Better   string // "less" or "more"
	Bar      string // what must hold, in words
	Against  string // contestant the ratio is taken against
	Samples  map[string][]float64
	Order    []string
	Failures map[string]string
}

func (r *row) add(who string, v float64) {
	if r.Samples == nil {
		r.Samples = map[string][]float64{}
	}
	if !slices.Contains(r.Order, who) {
		r.Order = append(r.Order, who)
	}
	r.Samples[who] = append(r.Samples[who], v)
}

func (r *row) fail(who, why string) {
	if r.Failures == nil {
		r.Failures = map[string]string{}
	}
	if !slices.Contains(r.Order, who) {
		r.Order = append(r.Order, who)
	}
	r.Failures[who] = why
}

func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	i := int(q * float64(len(s)-1))
	if q == 0.5 && len(s)%2 == 0 {
		return (s[len(s)/2-1] + s[len(s)/2]) / 2
	}
	return s[i]
}

type report struct {
	Date, Kernel, CPU string
	CPUs, N           int
	Rows              []*row
}

type bench struct {
	ctx       context.Context
	dir       string
	n         int
	sustained time.Duration
	only      *regexp.Regexp
	rep       *report
	e         *env
}

func main() {
	var (
		bin       = flag.String("bin", "bin", "folder with servin and servind")
		out       = flag.String("out", "bench/results", "folder for the results")
		n         = flag.Int("n", 50, "alternations of the latency rows")
		only      = flag.String("only", "", "run only the rows whose name matches")
		sustained = flag.Duration("sustained", time.Minute, "length of the sustained row")
	)
	flag.Parse()
	if os.Getenv("SERVIN_BENCH_IN_NS") == "" {
		fmt.Fprintln(os.Stderr, "bench: start it with bench/run: it needs namespaces of its own")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "servin-bench-")
	if err != nil {
		fatal(err)
	}
	b := &bench{ctx: ctx, dir: dir, n: *n, sustained: *sustained, only: regexp.MustCompile(*only), rep: describe(*n)}
	code := 0
	if b.e, err = setup(ctx, dir, *bin); err == nil {
		err = b.all()
	}
	b.e.close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		code = 1
	}
	_ = os.RemoveAll(dir)
	text := b.rep.table()
	fmt.Print(text)
	if *only == "" && code == 0 {
		if err := save(*out, b.rep, text); err != nil {
			fatal(err)
		}
	}
	os.Exit(code)
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

func describe(n int) *report {
	r := &report{Date: time.Now().UTC().Format("2006-01-02 15:04"), CPUs: runtime.NumCPU(), N: n}
	if out, err := exec.Command("uname", "-r").Output(); err == nil {
		r.Kernel = strings.TrimSpace(string(out))
	}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(data); m != nil {
			r.CPU = string(m[1])
		}
	}
	return r
}

func save(dir string, rep *report, text string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(rep, "", " ")
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{"latest.json": raw, "latest.md": []byte(text), "latest.svg": rep.svg(), "latest.png": rep.png()} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
