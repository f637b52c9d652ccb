package ociruntime

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// logger writes messages in the two forms that engines read: logfmt to a
// terminal, and JSON objects with level, msg and time, whose last error
// containerd's shim and conmon tell their callers.
type logger struct {
	out   *os.File
	json  bool
	debug bool
	own   bool // out is not standard error
}

func newLogger() *logger { return &logger{out: os.Stderr} }

func (l *logger) configure(file, format string, debug bool) error {
	l.debug = debug
	switch format {
	case "", "text":
	case "json":
		l.json = true
	default:
		return fmt.Errorf("invalid log-format: %s", format)
	}
	if file == "" {
		return nil
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_SYNC, 0o644)
	if err != nil {
		return err
	}
	l.out, l.own = f, true
	return nil
}

func (l *logger) write(level, msg string) {
	now := time.Now().Format(time.RFC3339)
	if l.json {
		b, _ := json.Marshal(struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
			Time  string `json:"time"`
		}{level, msg, now})
		_, _ = l.out.Write(append(b, '\n'))
		return
	}
	if strings.ContainsAny(msg, " \t\n\"=") || msg == "" {
		msg = strconv.Quote(msg)
	}
	fmt.Fprintf(l.out, "time=%q level=%s msg=%s\n", now, level, msg)
}

func (l *logger) Debugf(format string, args ...any) {
	if l.debug {
		l.write("debug", fmt.Sprintf(format, args...))
	}
}
func (l *logger) Warnf(format string, args ...any) { l.write("warning", fmt.Sprintf(format, args...)) }
func (l *logger) Errorf(format string, args ...any) {
	l.write("error", fmt.Sprintf(format, args...))
}

// fatal logs the error that ends the program, and says it on standard error, too.
func (l *logger) fatal(err error) {
	l.write("error", err.Error())
	if l.own {
		fmt.Fprintln(os.Stderr, err)
	}
}
