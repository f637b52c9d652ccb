package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// contestant is one command that a row measures.
type contestant struct {
	name string
	argv func(i int) []string
}

func always(name string, argv []string) contestant {
	return contestant{name, func(int) []string { return argv }}
}

// alternate runs every contestant once a round, n rounds and one to warm up.
func (b *bench) alternate(r *row, n int, cs ...contestant) {
	for i := range n + 1 {
		for _, c := range cs {
			if b.ctx.Err() != nil {
				return
			}
			argv := c.argv(i)
			cmd := exec.CommandContext(b.ctx, argv[0], argv[1:]...)
			var errb strings.Builder
			cmd.Stderr = &errb
			t := time.Now()
			err := cmd.Run()
			d := time.Since(t)
			if err != nil {
				r.fail(c.name, strings.TrimSpace(errb.String()))
				continue
			}
			if i > 0 {
				r.add(c.name, float64(d.Microseconds())/1e3)
			}
		}
	}
}

func (b *bench) row(name, unit, better, bar, against string, fn func(*row) error) error {
	if !b.only.MatchString(name) || b.ctx.Err() != nil {
		return b.ctx.Err()
	}
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format("15:04:05"), name)
	r := &row{Name: name, Unit: unit, Better: better, Bar: bar, Against: against}
	b.rep.Rows = append(b.rep.Rows, r)
	if err := fn(r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (b *bench) drain(cmd []string) error {
	_, err := run(b.ctx, with(cmd, "system", "drained", "--full")...)
	return err
}

func (b *bench) all() error {
	e, n := b.e, b.n
	podImage := "localhost/" + imageRef
	true_ := []string{imageRef, "/bin/true"}
	rm := func(cmd []string, args ...string) []string {
		return append(with(cmd, append([]string{"run", "--rm"}, args...)...), true_...)
	}
	podRm := func(args ...string) []string {
		return append(with(e.podman, append([]string{"run", "--rm"}, args...)...), podImage, "/bin/true")
	}
	const port = "18080:80"
	steps := []func() error{
		func() error {
			return b.row("run --rm, network none", "ms", "less", "15 times faster than docker, not slower than crun", "docker", func(r *row) error {
				b.alternate(r, n, always("servin", rm(e.servin, "--network", "none")), always("crun (bare)", []string{"crun", "run", "-b", e.bundle, "bench-crun"}),
					always("runc (bare)", []string{"runc", "run", "-b", e.bundle, "bench-runc"}), always("docker", rm(e.docker, "--network", "none")),
					always("podman", podRm("--network", "none")),
					contestant{"ctr", func(i int) []string {
						return with(e.ctr, "run", "--rm", "docker.io/library/"+imageRef, fmt.Sprint("bench", i), "/bin/true")
					}})
				return nil
			})
		},
		func() error {
			return b.row("OCI runtime: run", "ms", "less", "not slower than crun, 2 times faster than runc", "crun", func(r *row) error {
				ociRun := func(name, bin, root string) contestant {
					return always(name, []string{bin, "--root", e.dir + "/" + root, "run", "-b", e.bundle, "bench-oci-" + root})
				}
				b.alternate(r, n, ociRun("servin", e.runtime, "oci-servin"), ociRun("crun", "crun", "oci-crun"), ociRun("runc", "runc", "oci-runc"))
				return nil
			})
		},
		func() error {
			return b.row("run --rm, bridge", "ms", "less", "12 times faster", "docker", func(r *row) error {
				b.alternate(r, n, always("servin", rm(e.servin)), always("docker", rm(e.docker)), always("podman", podRm()))
				return nil
			})
		},
		func() error {
			return b.row("run --rm -p, bridge", "ms", "less", "12 times faster", "docker", func(r *row) error {
				b.alternate(r, n, always("servin", rm(e.servin, "-p", port)), always("docker", rm(e.docker, "-p", port)))
				return nil
			})
		},
		func() error {
			return b.row("run --rm, bridge, cold (pool empty)", "ms", "less", "8 times faster", "docker", func(r *row) error {
				b.alternate(r, n, always("servin", rm(e.servinCold)), always("docker", rm(e.docker)))
				return nil
			})
		},
		func() error {
			return b.row("run --rm, none, cold (pool empty)", "ms", "less", "8 times faster", "docker", func(r *row) error {
				b.alternate(r, n, always("servin", rm(e.servinCold, "--network", "none")), always("docker", rm(e.docker, "--network", "none")))
				return nil
			})
		},
		func() error {
			return b.row("burst of 32 × run --rm, bridge, one after the other", "ms", "less", "8 times faster", "docker", func(r *row) error {
				for range 3 {
					if err := b.drain(e.servin); err != nil {
						return err
					}
					for _, c := range []contestant{always("servin", rm(e.servin)), always("docker", rm(e.docker))} {
						who, argv := c.name, c.argv(0)
						t := time.Now()
						for range 32 {
							if _, err := run(b.ctx, argv...); err != nil {
								return err
							}
						}
						r.add(who, float64(time.Since(t).Microseconds())/1e3)
					}
				}
				return nil
			})
		},
		func() error {
			return b.row("exec C true", "ms", "less", "10 times faster", "docker", func(r *row) error {
				for _, c := range [][]string{with(e.servin, "run", "-d", "--name", "xx", imageRef, "sleep", "1000"), with(e.docker, "run", "-d", "--name", "xx", imageRef, "sleep", "1000"), with(e.podman, "run", "-d", "--name", "xx", podImage, "sleep", "1000")} {
					if _, err := run(b.ctx, c...); err != nil {
						return err
					}
				}
				b.alternate(r, n, always("servin", with(e.servin, "exec", "xx", "true")), always("docker", with(e.docker, "exec", "xx", "true")), always("podman", with(e.podman, "exec", "xx", "true")))
				for _, c := range [][]string{e.servin, e.docker, e.podman} {
					if _, err := run(b.ctx, with(c, "rm", "-f", "xx")...); err != nil {
						return err
					}
				}
				return nil
			})
		},
		b.fleet,
		b.throughput,
		b.memory,
		b.pull,
		b.api,
		b.pods,
		b.network,
	}
	for _, s := range steps {
		if err := s(); err != nil {
			return err
		}
	}
	return nil
}

// fleet starts 50 containers at once, lists them, and weighs their monitors.
func (b *bench) fleet() error {
	e := b.e
	if !b.only.MatchString("50 × run -d in parallel, bridge") && !b.only.MatchString("ps with 50 containers") {
		return nil
	}
	who := []struct {
		name    string
		cmd     []string
		monitor string
	}{{"servin", e.servin, "servin-shim"}, {"docker", e.docker, "containerd-shim"}}
	par := &row{Name: "50 × run -d in parallel, bridge", Unit: "ms", Better: "less", Bar: "5 times faster", Against: "docker"}
	ps := &row{Name: "ps with 50 containers", Unit: "ms", Better: "less", Bar: "4 times faster", Against: "docker"}
	mon := &row{Name: "memory of monitoring one container, PSS", Unit: "MB", Better: "less", Bar: "under 0.4 MB", Against: "docker"}
	slab := &row{Name: "kernel slab growth for one container", Unit: "MB", Better: "less", Against: "docker"}
	b.rep.Rows = append(b.rep.Rows, par, ps, mon, slab)
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format("15:04:05"), par.Name)
	for round := range 3 {
		for _, w := range who {
			slab0 := meminfo("Slab")
			t := time.Now()
			var wg sync.WaitGroup
			errs := make(chan error, 50)
			for i := range 50 {
				wg.Go(func() {
					if _, err := run(b.ctx, with(w.cmd, "run", "-d", "--name", fmt.Sprint("f", i), imageRef, "sleep", "1000")...); err != nil {
						errs <- err
					}
				})
			}
			wg.Wait()
			d := time.Since(t)
			close(errs)
			for err := range errs {
				return err
			}
			par.add(w.name, float64(d.Microseconds())/1e3)
			time.Sleep(time.Second)
			pids := processes(func(_ int, c string) bool { return strings.Contains(c, w.monitor) })
			m, err := pss(pids...)
			if err != nil {
				return err
			}
			mon.add(w.name, m/float64(max(len(pids), 1)))
			slab.add(w.name, (meminfo("Slab")-slab0)/50)
			if round == 2 {
				b.alternate(ps, b.n, always(w.name, with(w.cmd, "ps")))
			}
			argv := with(w.cmd, "rm", "-f")
			for i := range 50 {
				argv = append(argv, fmt.Sprint("f", i))
			}
			if _, err := run(b.ctx, argv...); err != nil {
				return err
			}
		}
	}
	return nil
}

func meminfo(field string) float64 {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for _, l := range strings.Split(string(data), "\n") {
		if f := strings.Fields(l); len(f) > 1 && f[0] == field+":" {
			kb, _ := strconv.ParseFloat(f[1], 64)
			return kb / 1024
		}
	}
	return 0
}

// throughput runs containers two at a time; the clock stops when no teardown is
// pending and the pool is full again, so that work is not merely put off.
func (b *bench) throughput() error {
	e := b.e
	return b.row("sustained run --rm, bridge, 2 at a time", "a second", "more", "8 times as many", "docker", func(r *row) error {
		for _, w := range []struct {
			name  string
			cmd   []string
			drain bool
		}{{"servin", e.servin, true}, {"docker", e.docker, false}} {
			start := time.Now()
			var mu sync.Mutex
			var wg sync.WaitGroup
			done := 0
			var failed error
			for range 2 {
				wg.Go(func() {
					for time.Since(start) < b.sustained && b.ctx.Err() == nil {
						_, err := run(b.ctx, with(w.cmd, "run", "--rm", imageRef, "/bin/true")...)
						mu.Lock()
						if err != nil {
							failed = err
						} else {
							done++
						}
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			if failed != nil {
				return failed
			}
			if w.drain {
				if err := b.drain(w.cmd); err != nil {
					return err
				}
			}
			r.add(w.name, float64(done)/time.Since(start).Seconds())
		}
		return nil
	})
}

// memory weighs the idle daemons after 40 runs.
func (b *bench) memory() error {
	e := b.e
	return b.row("idle daemons with parked shims, PSS, after 40 runs", "MB", "less", "under 35 MB", "docker", func(r *row) error {
		for _, c := range [][]string{e.servin, e.docker} {
			for range 40 {
				if _, err := run(b.ctx, with(c, "run", "--rm", imageRef, "/bin/true")...); err != nil {
					return err
				}
			}
		}
		if err := b.drain(e.servin); err != nil {
			return err
		}
		select {
		case <-b.ctx.Done():
			return b.ctx.Err()
		case <-time.After(20 * time.Second):
		}
		shims := processes(func(_ int, c string) bool { return strings.Contains(c, "servin-shim") })
		m, err := pss(append(shims, e.servind.Process.Pid)...)
		if err != nil {
			return err
		}
		r.add("servin", m)
		if m, err = pss(e.dockerd.Process.Pid, e.containerd.Process.Pid); err != nil {
			return err
		}
		r.add("docker", m)
		return nil
	})
}

// network measures tcp through a published port from another host, and between
// two containers of a bridge.
func (b *bench) network() error {
	e := b.e
	if !b.only.MatchString("tcp through a published port") {
		return nil
	}
	who := []struct {
		name string
		cmd  []string
		port string
	}{{"servin", e.servin, "15201"}, {"docker", e.docker, "15202"}}
	for _, w := range who {
		if _, err := run(b.ctx, with(w.cmd, "run", "-d", "--name", "iperf", "-p", w.port+":5201", imageRef, "/bin/iperf3", "-s")...); err != nil {
			return err
		}
		if _, err := run(b.ctx, with(w.cmd, "run", "-d", "--name", "client", imageRef, "sleep", "1000")...); err != nil {
			return err
		}
	}
	time.Sleep(time.Second)
	outer := fmt.Sprint(e.outside.Process.Pid)
	pub := &row{Name: "tcp through a published port", Unit: "Gbit/s", Better: "more", Bar: "no slower", Against: "docker"}
	mid := &row{Name: "tcp between two containers on a bridge", Unit: "Gbit/s", Better: "more", Bar: "no slower", Against: "docker"}
	b.rep.Rows = append(b.rep.Rows, pub, mid)
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format("15:04:05"), pub.Name)
	for i := range 16 {
		for k := range who {
			w := who[(i+k)%len(who)] // nobody is always first
			out, err := run(b.ctx, "nsenter", "-t", outer, "-n", "iperf3", "-c", "192.0.2.1", "-p", w.port, "-t", "2", "-J")
			if err != nil {
				pub.fail(w.name, err.Error())
			} else {
				pub.add(w.name, gbits(out))
			}
			ip, err := run(b.ctx, with(w.cmd, "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "iperf")...)
			if err != nil {
				return err
			}
			out, err = run(b.ctx, with(w.cmd, "exec", "client", "/bin/iperf3", "-c", ip, "-t", "2", "-J")...)
			if err != nil {
				mid.fail(w.name, err.Error())
			} else {
				mid.add(w.name, gbits(out))
			}
		}
	}
	for _, w := range who {
		if _, err := run(b.ctx, with(w.cmd, "rm", "-f", "iperf", "client")...); err != nil {
			return err
		}
	}
	return nil
}

// pull fetches and unpacks a 5-layer, 300 MB image from a registry on loopback.
func (b *bench) pull() error {
	e := b.e
	return b.row("pull and unpack, 5 layers, 300 MB", "ms", "less", "faster than docker and ctr", "docker", func(r *row) error {
		// Every pull is of an image that nobody has seen: a file system that has
		// just deleted as many files is slow for whoever comes next, and what
		// docker has, ctr need not fetch, for they share containerd's store.
		const rounds = 5
		host, stop, err := serveImages(b.ctx, filepath.Join(b.dir, "registry"), 2*rounds)
		if err != nil {
			return err
		}
		defer stop()
		who := []struct {
			name string
			pull func(i int) []string
		}{
			{"servin", func(i int) []string { return with(e.servin, "pull", "-q", fmt.Sprintf("%s/big:%d", host, i)) }},
			{"docker", func(i int) []string { return with(e.docker, "pull", "-q", fmt.Sprintf("%s/big:%d", host, i)) }},
			{"ctr", func(i int) []string {
				return with(e.ctr, "image", "pull", "--plain-http", fmt.Sprintf("%s/big:%d", host, rounds+i))
			}},
		}
		peak := &row{Name: "peak memory of the daemon in pulls (since its start)", Unit: "MB", Better: "less", Bar: "under 100 MB", Against: "docker"}
		for i := range rounds {
			for _, w := range who {
				_, _ = run(b.ctx, "sync")
				t := time.Now()
				_, err := run(b.ctx, w.pull(i)...)
				d := time.Since(t)
				if err != nil {
					r.fail(w.name, err.Error())
				} else if i > 0 {
					r.add(w.name, float64(d.Microseconds())/1e3)
				}
			}
		}
		peak.add("servin", hwm(e.servind.Process.Pid))
		peak.add("docker", hwm(e.dockerd.Process.Pid)+hwm(e.containerd.Process.Pid))
		b.rep.Rows = append(b.rep.Rows, peak)
		return nil
	})
}

func hwm(pid int) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for _, l := range strings.Split(string(data), "\n") {
		var kb float64
		if n, _ := fmt.Sscanf(l, "VmHWM: %f kB", &kb); n == 1 {
			return kb / 1024
		}
	}
	return 0
}
