package container

import (
	"time"

	"github.com/moby/moby/api/types/container"
)

// Defaults of a health check's settings.
const (
	HealthInterval      = 30 * time.Second
	HealthTimeout       = 30 * time.Second
	HealthStartInterval = 5 * time.Second
	HealthRetries       = 3
	// HealthLogSize is how many results are kept, HealthOutputSize how many
	// bytes of a probe's output.
	HealthLogSize    = 5
	HealthOutputSize = 4096
)

// HealthCheck is a health check with every default filled in.
type HealthCheck struct {
	Test                       []string // begins with CMD or CMD-SHELL
	Interval, Timeout          time.Duration
	StartPeriod, StartInterval time.Duration
	Retries                    int
}

// NewHealthCheck fills in defaults; ok is false where there is nothing to check.
func NewHealthCheck(c *container.HealthConfig) (h HealthCheck, ok bool) {
	if c == nil || len(c.Test) < 2 || (c.Test[0] != "CMD" && c.Test[0] != "CMD-SHELL") {
		return HealthCheck{}, false
	}
	or := func(v, d time.Duration) time.Duration {
		if v <= 0 {
			return d
		}
		return v
	}
	h = HealthCheck{
		Test: c.Test, Interval: or(c.Interval, HealthInterval), Timeout: or(c.Timeout, HealthTimeout),
		StartPeriod: max(c.StartPeriod, 0), StartInterval: or(c.StartInterval, HealthStartInterval), Retries: c.Retries,
	}
	if h.Retries <= 0 {
		h.Retries = HealthRetries
	}
	return h, true
}

// Delay tells how long to wait before the next probe of a container that has
// been running for up.
func (h HealthCheck) Delay(status container.HealthStatus, up time.Duration) time.Duration {
	if status == container.Starting && up < h.StartPeriod {
		return h.StartInterval
	}
	return h.Interval
}

// Judge takes one result into account. A failure within the start period does
// not count until the first success. The health given is not changed.
func (h HealthCheck) Judge(cur *container.Health, res container.HealthcheckResult, up time.Duration) *container.Health {
	next := container.Health{Status: container.Starting}
	if cur != nil {
		next.Status, next.FailingStreak = cur.Status, cur.FailingStreak
		log := cur.Log
		if len(log) >= HealthLogSize {
			log = log[len(log)-HealthLogSize+1:]
		}
		next.Log = append(make([]*container.HealthcheckResult, 0, len(log)+1), log...)
	}
	next.Log = append(next.Log, &res)
	switch {
	case res.ExitCode == 0:
		next.Status, next.FailingStreak = container.Healthy, 0
	case next.Status == container.Starting && up < h.StartPeriod:
	default:
		next.FailingStreak++
		if next.FailingStreak >= h.Retries {
			next.Status = container.Unhealthy
		}
	}
	return &next
}
