// Command servin-hello is the program of the image servin/hello, which the
// engine carries in itself: a greeting, a small web server, and the few tools
// that one misses in an image without a shell.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type tool struct {
	usage, help string
	run         func(args []string) int
}

func tools() map[string]tool {
	return map[string]tool{
		"hello":  {"", "say what works (the default)", hello},
		"serve":  {"[ADDRESS]", "serve a page about this container over http (default :8080)", serve},
		"env":    {"", "print the environment", func([]string) int { fmt.Println(strings.Join(os.Environ(), "\n")); return 0 }},
		"echo":   {"WORDS...", "print the words", func(a []string) int { fmt.Println(strings.Join(a, " ")); return 0 }},
		"cat":    {"[FILES...]", "print files, or standard input", cat},
		"ls":     {"[PATHS...]", "list directories", ls},
		"id":     {"", "print user, groups and host name", id},
		"mounts": {"", "print what is mounted", func([]string) int { return cat([]string{"/proc/self/mounts"}) }},
		"sleep":  {"SECONDS", "wait; ends at once on a signal", sleep},
		"true":   {"", "succeed", func([]string) int { return 0 }},
		"false":  {"", "fail", func([]string) int { return 1 }},
		"exit":   {"N", "exit with status N", exit},
		"get":    {"HOST:PORT[/PATH]", "fetch a page over http", get},
		"help":   {"", "print this list", func([]string) int { usage(os.Stdout); return 0 }},
	}
}

func main() {
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	all := tools()
	if _, ok := all[name]; !ok || name == "hello" {
		name = "hello"
		if len(args) > 0 {
			name, args = args[0], args[1:]
		}
	}
	t, ok := all[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "servin-hello: no tool %q\n", name)
		usage(os.Stderr)
		os.Exit(127)
	}
	os.Exit(t.run(args))
}

func usage(w io.Writer) {
	all := tools()
	names := make([]string, 0, len(all))
	for n := range all {
		names = append(names, n)
	}
	sort.Strings(names)
	fmt.Fprintln(w, "Tools in this image:")
	for _, n := range names {
		fmt.Fprintf(w, "  %-24s %s\n", strings.TrimSpace(n+" "+all[n].usage), all[n].help)
	}
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, "servin-hello:", err)
	return 1
}

func hello([]string) int {
	host, _ := os.Hostname()
	fmt.Printf(`Hello from a container.

  host name   %s
  process     %d
  user        %d:%d

It was made from an image that the engine carries in itself, unpacked into
layers, and started in namespaces of its own. Everything works.
`, host, os.Getpid(), os.Getuid(), os.Getgid())
	return 0
}

func cat(args []string) int {
	if len(args) == 0 {
		if _, err := io.Copy(os.Stdout, os.Stdin); err != nil {
			return failed(err)
		}
	}
	for _, name := range args {
		f, err := os.Open(name)
		if err != nil {
			return failed(err)
		}
		_, err = io.Copy(os.Stdout, f)
		f.Close()
		if err != nil {
			return failed(err)
		}
	}
	return 0
}

func ls(args []string) int {
	if len(args) == 0 {
		args = []string{"."}
	}
	for _, dir := range args {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return failed(err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			} else if err != nil {
				return failed(err)
			}
			fmt.Printf("%s %9d %s\n", info.Mode(), info.Size(), e.Name())
		}
	}
	return 0
}

func id([]string) int {
	groups, _ := os.Getgroups()
	host, _ := os.Hostname()
	fmt.Printf("uid=%d gid=%d groups=%v host=%s\n", os.Getuid(), os.Getgid(), groups, host)
	return 0
}

func sleep(args []string) int {
	if len(args) != 1 {
		return failed(errors.New("usage: sleep SECONDS"))
	}
	s, err := strconv.ParseFloat(args[0], 64)
	if err != nil || s < 0 {
		return failed(fmt.Errorf("%q is no number of seconds", args[0]))
	}
	// As process 1, a signal without a handler would be ignored.
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	select {
	case sig := <-c:
		return 128 + int(sig.(syscall.Signal))
	case <-time.After(time.Duration(s * float64(time.Second))):
		return 0
	}
}

func exit(args []string) int {
	if len(args) == 1 {
		if n, err := strconv.Atoi(args[0]); err == nil && n >= 0 && n < 256 {
			return n
		}
	}
	return failed(errors.New("usage: exit N, N from 0 to 255"))
}

// get speaks HTTP/1.0 itself: the standard client would triple the image.
func get(args []string) int {
	if len(args) != 1 {
		return failed(errors.New("usage: get HOST:PORT[/PATH]"))
	}
	addr, path, _ := strings.Cut(strings.TrimPrefix(args[0], "http://"), "/")
	if _, _, err := net.SplitHostPort(addr); err != nil {
		addr = net.JoinHostPort(addr, "80")
	}
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET /%s HTTP/1.0\r\nHost: %s\r\n\r\n", path, addr); err != nil {
		return failed(err)
	}
	resp, err := io.ReadAll(io.LimitReader(c, 16<<20))
	if err != nil {
		return failed(err)
	}
	head, body, _ := strings.Cut(string(resp), "\r\n\r\n")
	fmt.Print(body)
	if f := strings.Fields(head); len(f) < 2 || f[1] != "200" {
		return failed(fmt.Errorf("the server answers %q", strings.SplitN(head, "\r\n", 2)[0]))
	}
	return 0
}

// serve answers every request with facts about the container, one line each.
func serve(args []string) int {
	addr := ":8080"
	if len(args) > 0 {
		addr = args[0]
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return failed(err)
	}
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-c; os.Exit(0) }()
	host, _ := os.Hostname()
	fmt.Printf("serving http on %s\n", ln.Addr())
	for n := 1; ; n++ {
		conn, err := ln.Accept()
		if err != nil {
			return failed(err)
		}
		go answer(conn, host, n)
	}
}

func answer(conn net.Conn, host string, n int) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 0, 4096)
	for !strings.Contains(string(buf), "\r\n\r\n") && len(buf) < cap(buf) {
		k, err := conn.Read(buf[len(buf):cap(buf)])
		if err != nil {
			return
		}
		buf = buf[:len(buf)+k]
	}
	line, _, _ := strings.Cut(string(buf), "\r\n")
	body := fmt.Sprintf("Hello from container %s\nrequest %d: %s\nfrom %s\n", host, n, line, conn.RemoteAddr())
	fmt.Fprintf(conn, "HTTP/1.0 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	fmt.Println(line, "from", conn.RemoteAddr())
}
